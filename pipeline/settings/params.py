"""The content of params.yaml: one section per stage, and the type, range and meaning of every key.

Only methods and guidance, and the training of a guide, have defaults: the values of their papers, and those that suit
most images. Every other key must be in params.yaml, so that all settings of a run are in one place. The command line
generates its flags and their help from these descriptions.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, SerializeAsAny, StringConstraints, field_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Name of a folder, a DVC stage or a run: letters, digits, - and _."""

Layer = Annotated[str, StringConstraints(pattern=r"^(up_blocks|transformer_blocks)\.\d+$")]
"""Name of a layer of the frozen model."""

ImageSource = Literal[
    "digits", "cifar10", "cifar100", "svhn", "mnist", "usps", "flowers102", "fgvc-aircraft", "stanford-cars",
    "tiny-imagenet", "digits-five", "folder", "domain-folder", "webdataset", "parquet", "hf-dataset",
]  # fmt: skip
"""Sources of images, which `stages.prepare_data.sources` reads."""


class Section(BaseModel):
    """A section of params.yaml: strict types, finite numbers, no unknown keys, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _fits_into_64_bits(cls, value: Any) -> Any:
        """Reject integers that do not fit into int64 arrays and manifests."""
        if any(isinstance(one, int) and one >= 2**63 for one in (value if isinstance(value, list) else [value])):
            raise PydanticCustomError("too_large", "Input should be less than 9223372036854775808 (2^63)")
        return value


class PrepareData(Section):
    """Images -> data/datasets/<name>."""

    name: Name = Field(description="names data/datasets/<name>")
    source: ImageSource = Field(
        description="folder (<class>/<image>), domain-folder (<domain>/<class>/<image>), webdataset (tars), parquet, "
        "hf-dataset (Hugging Face: a folder of save_to_disk, or on the hub), or a data set by its name"
    )
    path: str | None = Field(
        description="folder of the source's files; null: data/raw/<source>. digits needs none. webdataset and parquet: "
        "also a pattern, such as 'shards/{train,val}-{000..146}.tar'; hf-dataset: also organisation/name@commit"
    )
    image_column: str | None = Field(
        min_length=1,
        description="parquet, hf-dataset: column of the images; webdataset: ending of their files, such as rgb.jpg; "
        "null: the only one",
    )
    label_column: str | None = Field(
        min_length=1,
        description="parquet, hf-dataset: column of the labels; webdataset: key in the samples' .json; null: the only "
        "column of class labels, or label; .cls, or else label in .json, or the class name in .txt",
    )
    image_size: int = Field(ge=8, le=1024, description="images are stored at this height and width, pixels")
    train_subset: int | None = Field(ge=1, description="keep this many training images, stratified by class")
    broken_images: Literal["stop", "skip"] = Field(
        description="what to do with unreadable images: stop with an error that lists them all, or skip them "
        "and list them in the data set's manifest.json"
    )
    seed: int = Field(ge=0, description="seed of the subset, and of the test split if the source has none")


class GuideTraining(Section):
    """The training of a guide on images of one's own, if prepare_backbone.source is train."""

    size: Literal["nano", "small", "base"] = Field(
        "small", description="parameters of the model: about 2, 8 or 40 million"
    )
    image_size: int = Field(
        32, ge=8, le=256, multiple_of=8, description="images are resized to this height and width, pixels"
    )
    caption: str = Field(
        "a photo of a {class_name}",
        pattern=r"\{class_name\}",
        description="caption of every image; {class_name} is replaced by the name of its folder",
    )
    batch_size: int = Field(512, ge=1, le=65536, description="images per step")
    autoencoder_steps: int = Field(3000, ge=1, description="steps of the autoencoder")
    denoiser_steps: int = Field(20000, ge=1, description="steps of the denoiser and the text encoder, after it")
    autoencoder_learning_rate: float | None = Field(
        None, gt=0, description="AdamW's largest rate; null: what suits the size"
    )
    denoiser_learning_rate: float | None = Field(
        None, gt=0, description="AdamW's largest rate; null: what suits the size"
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay of the average of the weights, which is the result")
    empty_caption_rate: float = Field(
        0.1, ge=0, lt=1, description="share of images that are shown without a caption, for guided sampling"
    )
    flips: bool = Field(
        False, description="also train on mirrored images: for photographs, not for digits, text or X-rays"
    )
    seed: int = Field(0, ge=0, description="seed of the weights and of everything that is drawn")


class PrepareBackbone(Section):
    """The frozen diffusion model -> models/<name> and data/backbones/<name>.json."""

    name: Name = Field(description="names models/<name>")
    source: str = Field(
        min_length=1,
        description="embedded (tiny-sd), train (a model trained on corpus), a directory in diffusers format, or a "
        "model of the Hugging Face hub: its id, such as org/model, its page's URL, or org/model@commit",
    )
    revision: str | None = Field(description="hub only: the commit, 40 hexadecimal digits; null with any other source")
    variant: Literal["auto", "fp16", "none"] = Field(
        description="weights to use if a model has both full and fp16 ones: none is full, fp16 is half the size; "
        "auto is fp16 from the hub if extract_features.dtype has 16 bits, else full; or the only ones that exist"
    )
    corpus: str = Field(
        min_length=1,
        description="train only, else data/corpus/none: folder of public images, as <class>/<image>; an absolute path, "
        "or one in the project",
    )
    training: GuideTraining = Field(description="train only: the model and its training; {} for the defaults")


class ExtractFeatures(Section):
    """Stage 1. Every key but rows_per_shard determines the features and is part of the fingerprint."""

    version: int = Field(ge=1, description="version of the computation; must equal what this code computes")
    timestep: int = Field(ge=0, le=999, description="diffusion timestep of the noised latents")
    layers: Literal["auto"] | list[Layer] = Field(
        min_length=1,
        description="layers to read, up_blocks.N or transformer_blocks.N; auto is the backbone's own choice (a UNet's "
        "last three up blocks, the paper's layers 2-4)",
    )
    dims: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="PCA dimensions kept per layer, at most its channels"
    )
    image_size: int = Field(ge=8, le=2048, description="images are resized to this before encoding, pixels")
    prompts: Literal["class", "self-supervised"] = Field(
        description="class: one prompt per class; self-supervised, without labels: one for all images, and random words"
    )
    prompt_templates: list[Annotated[str, StringConstraints(pattern=r"\{class_name\}")]] = Field(
        min_length=1,
        description="conditional prompts; {class_name} is replaced by a class or word; their embeddings are averaged",
    )
    class_prompts: str | None = Field(
        description="file (YAML or JSON): class name -> text, or list of texts, which replace the templates"
    )
    self_supervised_prompt: str = Field(description="self-supervised: the prompt that fits every image")
    negative_words: str | None = Field(
        description="self-supervised: file of negative words, one per line; null: Tiny-ImageNet's classes"
    )
    denoise_prompt: str = Field(description="generic prompt of the denoising representation")
    negatives: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        description="non-matching prompts per image: all others, or K: the nearest by text embedding (class), or drawn "
        "at random (self-supervised)"
    )
    image_conditioning: str | None = Field(
        description="directory of a CLIP image encoder whose embedding is added to the prompts'; null for none"
    )
    noise_seed: int = Field(ge=0, description="seed of the per-image noise, the basis images and random negatives")
    basis: str = Field(min_length=1, description="auto fits the PCA basis; or the path of a basis.h5 to share")
    basis_images: int = Field(ge=2, description="training images on which the PCA basis is fitted")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="the frozen model computes in this type")
    storage: Literal["float16", "int8"] = Field(description="type of the stored features; int8 takes half the bytes")
    rows_per_shard: int = Field(ge=1, description="images per HDF5 shard")


class AnalyzeFeatures(Section):
    """Analysis of the cached features -> analysis/."""

    images: int = Field(ge=10, description="at most this many training images, drawn at random")
    validation_fraction: float = Field(gt=0, lt=1, description="fraction of them on which linear probes are evaluated")
    splits: int = Field(ge=1, le=1000, description="number of random validation splits; the accuracy is their mean")
    tsne_images: int = Field(ge=4, description="at most this many images in the t-SNE picture")
    perplexity: float = Field(gt=0, description="t-SNE's number of neighbours")
    seed: int = Field(ge=0, description="seed of the sample, the splits, k-means and t-SNE")


class SweepFeatures(Section):
    """Comparison of timesteps and layers on a sample -> analysis/sweep; evaluated as in analyze_features."""

    timesteps: list[Annotated[int, Field(ge=0, le=999)]] = Field(
        min_length=1, description="diffusion timesteps to compare; every layer is read at each"
    )
    images: int = Field(ge=10, description="at most this many training images, drawn at random")
    basis_images: int = Field(ge=2, description="number of these images used to fit each PCA basis (kept in memory)")
    margin_images: int = Field(
        ge=0, description="number of these images that also run with each of their P prompts (P extra passes per image)"
    )
    explained_variance: float = Field(gt=0, le=1, description="share of its variance that a layer's PCA must explain")
    max_dims: int = Field(ge=1, description="keep at most this many PCA dimensions per layer")
    standard_errors: float = Field(
        ge=0,
        description="candidates within this many standard errors of the best count as equal, by the probe, then the "
        "prompt margin; the fewest layers win, then the fewest dimensions",
    )
    picture_images: int = Field(ge=0, description="number of images whose feature maps are drawn in colour")


class Synthesize(Section):
    """Images of every class, generated by the frozen model -> data/datasets/<name>-synthetic."""

    images_per_class: int = Field(ge=0, description="images generated of each class; 0 generates none")
    prompt_template: str = Field(pattern=r"\{class_name\}", description="prompt; {class_name} is replaced by the class")
    num_inference_steps: int = Field(ge=1, description="DDIM steps")
    guidance_scale: float = Field(ge=1, description="classifier-free guidance; 1 for none")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="the frozen model computes in this type")
    seed: int = Field(ge=0, description="seed of the first noise of every image")


class TrainFL(Section):
    """Stage 2: what all methods share."""

    model: Literal["small_cnn", "resnet10", "resnet18", "mobilenet_v2"] = Field(description="the clients' encoder")
    normalisation: Literal["batch", "group"] = Field(
        description="the encoder's layers: BatchNorm, or GroupNorm in its place (small_cnn has none)"
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        description="precision of the encoder's computations: float32; tf32, faster on a GPU with about three decimal "
        "digits in products, and float32 on a CPU; bfloat16, by autocast"
    )
    projection_dim: int | None = Field(
        ge=1, description="every method's model gets MOON's projection head of this length before its classifier"
    )
    num_clients: int = Field(
        ge=1, description="clients that share the training set (label-skew and domain may set their own number)"
    )
    clients_per_round: int = Field(ge=1, description="clients sampled each round")
    num_rounds: int = Field(ge=1, description="communication rounds")
    local_epochs: int = Field(ge=1, description="epochs over a client's data per round")
    batch_size: int = Field(ge=1, description="local batch size")
    learning_rate: float = Field(gt=0, description="SGD's rate in the first round")
    learning_rate_decay: float = Field(gt=0, le=1, description="multiplies the rate after every round; 1 keeps it")
    momentum: float = Field(ge=0, lt=1, description="SGD's momentum; its buffer is reset every round")
    weight_decay: float = Field(ge=0, description="SGD's L2 penalty")
    gradient_clipping: float | None = Field(
        gt=0, description="largest norm of a step's gradient; null: no limit (the code of FedNH, FedCR, FedDyn: 10)"
    )
    augmentation: Literal["none", "crop", "crop-flip", "views"] = Field(
        description="of training images: none, a random crop after padding by 1/8, that and a random flip, or "
        "self-supervised views (resized crop, flip, colour)"
    )
    imbalance_factor: float = Field(
        gt=0, le=1, description="long tail before any partition: the last class's size to the first's; 1 keeps all"
    )
    balance_with_synthetic: Literal["none", "mean", "largest"] = Field(
        description="add images of the synthesize stage to every client's classes, up to the client's mean or largest "
        "class size"
    )
    allow_seen_images: bool = Field(
        description="allow guidance by a backbone that was trained on images of the data set; it is an advantage that "
        "a fair comparison does not have"
    )
    evaluate_on: Literal["test", "validation"] = Field(
        description="validation holds out a part of the training set: use it for every choice"
    )
    validation_fraction: float = Field(gt=0, lt=1, description="fraction held out if evaluate_on is validation")


class Guidance(Section):
    """FedDifRC's two losses and their targets; under any other method as its `guidance` section."""

    tdcl_weight: float = Field(1.0, ge=0, description="weight of the text-driven contrastive loss; 0 disables it")
    tdcl_targets: Literal["raw", "centred", "standardised"] = Field("raw", description="scaling of prompted targets")
    tdcl_normalisation: Literal["none", "representation", "scalar"] = Field(
        "none", description="divisor of TDCL's cosine: none, the mean distance U per representation, or its batch mean"
    )
    temperature: float = Field(0.04, gt=0, description="TDCL's temperature tau")
    ndcr_weight: float = Field(1.0, ge=0, description="weight of the consistency loss; 0 disables it")
    ndcr_targets: Literal["raw", "centred", "standardised"] = Field(
        "standardised", description="scaling of the denoising targets"
    )
    ndcr_form: Literal["normalised-l2", "l2", "kl"] = Field(
        "normalised-l2",
        description="NDCR: squared distance of unit vectors, of the vectors as they are, or the authors' code's KL",
    )
    layers: Literal["all"] | list[str] = Field(
        "all", description="decoder layers used as targets: all, or names from the feature set's manifest (up_blocks.1)"
    )


class MethodSettings(Section):
    """Settings of a `methods:` entry. Each method's file derives from it, with the `algorithm` that selects it."""

    guidance: Guidance | None = Field(default=None, description="adds FedDifRC's losses to this method; null: none")


METHODS: dict[str, type[Section]] = {}
"""Settings class by `algorithm`. Methods register theirs when `stages.train_fl.methods` is imported."""


def _method_settings(value: Any) -> Section:
    """Validate a `methods:` entry by the settings class that its `algorithm` selects."""
    if not isinstance(value, dict):
        raise PydanticKnownError("dict_type")
    if "algorithm" not in value:
        raise PydanticKnownError("union_tag_not_found", {"discriminator": "'algorithm'"})
    algorithm = value["algorithm"]
    if not isinstance(algorithm, str) or algorithm not in METHODS:
        expected = ", ".join(map(repr, sorted(METHODS)))
        context = {"discriminator": "'algorithm'", "tag": str(algorithm), "expected_tags": expected}
        raise PydanticKnownError("union_tag_invalid", context)
    return METHODS[algorithm].model_validate(value)


class Dirichlet(Section):
    """Per-class Dirichlet over clients, the common algorithm."""

    kind: Literal["dirichlet"]
    alpha: float = Field(gt=0, description="concentration; small is heterogeneous")
    min_samples: int = Field(ge=1, description="draw again until every client has this many samples")


class DirichletBalanced(Section):
    """The FedDifRC authors' variant: Dirichlet inside groups of clients, then equal sizes."""

    kind: Literal["dirichlet-balanced"]
    alpha: float = Field(gt=0, description="concentration; small is heterogeneous")
    group_size: int = Field(ge=1, description="clients per group; 5 in the authors' code")


class LabelSkew(Section):
    """NID2, in FedDisco's definition: biased clients of a few classes and unbiased ones of all, equal sizes."""

    kind: Literal["label-skew"]
    n_biased: int = Field(ge=0, description="biased clients")
    classes_per_biased: int = Field(ge=1, description="classes of each biased client")
    n_unbiased: int = Field(ge=0, description="clients with all classes")


class ClassesPerClient(Section):
    """k classes per client."""

    kind: Literal["classes-per-client"]
    num_classes_each: int = Field(ge=1, description="k")


class IID(Section):
    """Random parts of equal size."""

    kind: Literal["iid"]


class ByDomain(Section):
    """Each client draws from one domain."""

    kind: Literal["domain"]
    clients_per_domain: Literal["even"] | list[Annotated[int, Field(ge=0)]] = Field(
        description="clients of each domain, in the data set's order; even: train_fl.num_clients assigned evenly"
    )
    samples_fraction: float = Field(gt=0, le=1, description="each client's share of its domain")


class Nodes(Section):
    """Every client's own images: in a federation of nodes (`flwr run`), where there is nothing to partition."""

    kind: Literal["nodes"]


class CentralPrivacy(Section):
    """Central differential privacy (McMahan et al., ICLR 2018): nodes clip, the server adds noise to the mean."""

    kind: Literal["central"]
    clipping_norm: float = Field(gt=0, description="largest norm of a node's update")
    noise_multiplier: float = Field(gt=0, description="noise on the sum of updates, standard deviation / clipping norm")


class LocalPrivacy(Section):
    """Local differential privacy: every node clips its update and adds noise before sending (Gaussian mechanism)."""

    kind: Literal["local"]
    clipping_norm: float = Field(gt=0, description="largest norm of a node's update")
    epsilon: float = Field(gt=0, description="privacy budget of one round")
    delta: float = Field(gt=0, lt=1, description="probability that the budget does not hold")


class Federation(Section):
    """A run over Flower (`flwr run`), where every client is a node."""

    min_clients: int = Field(ge=1, description="nodes that a round needs to start")
    join_timeout: float = Field(gt=0, description="seconds to wait for them; a start waits as long for all clients")
    round_timeout: float = Field(gt=0, description="seconds to wait for a round's replies; later ones are skipped")
    evaluation_clients: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        description="nodes that score the global model after each round, where the server has no test images"
    )
    differential_privacy: Annotated[CentralPrivacy | LocalPrivacy, Field(discriminator="kind")] | None = Field(
        description="noise on the nodes' updates: kind central or local; null: none"
    )


class Sweep(Section):
    """The runs of `dvc repro` and the rows of the report: methods x partitions x seeds."""

    methods: list[Name] = Field(min_length=1)
    partitions: list[Name] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)


class Report(Section):
    """The page."""

    title: str = Field(min_length=1, description="heading of the page")


class Runtime(Section):
    """Settings of speed, which change results by rounding or not at all; DVC does not track this section."""

    device: str = Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")
    unet_batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=65536)] = Field(
        description="(image, prompt) pairs per batch of the frozen model; auto fills a GPU's memory; 16 to 64 on "
        "the CPU, where batches are computed side by side"
    )
    compile: bool = Field(
        description="compile the diffusion model (torch.compile): minutes once, faster passes on a GPU"
    )
    cache_latents: bool = Field(description="cache the images' latents under .pipeline/ for the next extraction")
    synthesize_batch_size: int = Field(ge=1, description="synthesize: images generated at a time")
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        description="train-fl: clients trained side by side; on a CPU in processes of one thread, auto: one per core; "
        "on a GPU in streams, auto: 4"
    )
    cuda_graphs: bool = Field(description="train-fl: replay training steps on a GPU as CUDA graphs")
    channels_last: bool = Field(
        description="train-fl: channels-last memory format, except for GroupNorm on a CPU, which is slower in it"
    )
    checkpoint_every: int = Field(ge=1, description="train-fl: rounds between checkpoints")
    guide_checkpoint_minutes: float = Field(
        ge=0, description="prepare-backbone, source train: minutes between checkpoints"
    )
    tensorboard: bool = Field(description="train-fl: also log every round to tensorboard/<run>")
    dvclive: bool = Field(description="train-fl: also log every round to dvclive/<run>")


_AnyPartition = Dirichlet | DirichletBalanced | LabelSkew | ClassesPerClient | IID | ByDomain | Nodes
PARTITIONS: tuple[type[Section], ...] = get_args(_AnyPartition)
Partition = Annotated[_AnyPartition, Field(discriminator="kind")]
Method = Annotated[SerializeAsAny[Section], PlainValidator(_method_settings)]


class Params(Section):
    """All sections of params.yaml."""

    prepare_data: PrepareData
    prepare_backbone: PrepareBackbone
    extract_features: ExtractFeatures
    analyze_features: AnalyzeFeatures
    sweep_features: SweepFeatures
    synthesize: Synthesize
    train_fl: TrainFL
    methods: dict[Name, Method] = Field(min_length=1)
    partitions: dict[Name, Partition] = Field(min_length=1)
    federation: Federation
    sweep: Sweep
    report: Report
    runtime: Runtime
