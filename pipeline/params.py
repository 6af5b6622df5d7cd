"""What params.yaml may hold: one section a stage, every key with its type, its range and what it means.

No key has a default here: params.yaml is the only place for values, so what a run used can be read in one place. The
command line makes its flags, and --help its texts, from these descriptions.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Names a folder, a DVC stage or a run: letters, digits, - and _."""

Layer = Annotated[str, StringConstraints(pattern=r"^(up_blocks|transformer_blocks)\.\d+$")]
"""Names a layer of the frozen model."""


ImageSource = Literal[
    "digits", "cifar10", "cifar100", "svhn", "mnist", "usps", "flowers102", "fgvc-aircraft", "stanford-cars",
    "tiny-imagenet", "digits-five", "folder", "domain-folder",
]  # fmt: skip
"""Where images may come from; `stages.prepare_data.sources` reads each."""


class Section(BaseModel):
    """A section of params.yaml: strict types, finite numbers, no unknown keys, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class PrepareData(Section):
    """Images -> data/datasets/<name>."""

    name: Name = Field(description="names data/datasets/<name>")
    source: ImageSource = Field(
        description="digits (scikit-learn); folder (<class>/<image>), domain-folder (<domain>/<class>/<image>); or a "
        "data set by its name: cifar10, cifar100, svhn, mnist, usps, flowers102, fgvc-aircraft, stanford-cars, "
        "tiny-imagenet, digits-five"
    )
    path: str | None = Field(
        description="the folder that holds the source's files; null: data/raw/<source>. digits needs none"
    )
    image_size: int = Field(ge=8, le=1024, description="images are stored at this height and width, pixels")
    train_subset: int | None = Field(ge=1, description="keep this many training images, stratified by class")
    broken_images: Literal["stop", "skip"] = Field(
        description="stop at an image that cannot be read, or skip it and list it in the data set's manifest.json"
    )
    seed: int = Field(ge=0, description="seed of the subset and of splits that the source does not give")


class PrepareBackbone(Section):
    """The frozen diffusion model -> models/<name> and data/backbones/<name>.json."""

    name: Name = Field(description="names models/<name>")
    source: str = Field(
        min_length=1, description="embedded (tiny-sd), a directory in diffusers format, or a hub id such as org/model"
    )
    revision: str | None = Field(description="hub id only: the commit, tag or branch to pin")


class ExtractFeatures(Section):
    """Stage 1. Only what decides the features: every key here is part of the fingerprint."""

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
        description="one prompt per class, or without labels: one that fits every image, and random words"
    )
    prompt_templates: list[Annotated[str, StringConstraints(pattern=r"\{class_name\}")]] = Field(
        min_length=1,
        description="conditional prompt, {class_name} filled in with a class or word; the embeddings are averaged",
    )
    class_prompts: str | None = Field(
        description="file (YAML or JSON): class name -> text, or list of texts, to take instead of the templates"
    )
    self_supervised_prompt: str = Field(description="self-supervised: the prompt that fits every image")
    negative_words: str | None = Field(
        description="self-supervised: file of words, one a line, to draw negatives from; null: Tiny-ImageNet's classes"
    )
    denoise_prompt: str = Field(description="generic prompt of the denoising representation")
    negatives: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        description="non-matching prompts per image: all others, or K: the nearest by text embedding (class), or drawn "
        "at random (self-supervised)"
    )
    image_conditioning: str | None = Field(
        description="directory of a CLIP image encoder whose embedding is added to the prompts'; null is without"
    )
    noise_seed: int = Field(ge=0, description="seed of the per-image noise, the basis images and random negatives")
    basis: str = Field(min_length=1, description="auto fits the PCA basis; or the path of a basis.h5 to share")
    basis_images: int = Field(ge=2, description="training images on which the PCA basis is fitted")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="the frozen model computes in this type")
    rows_per_shard: int = Field(ge=1, description="images per HDF5 shard")


class TrainFL(Section):
    """Stage 2: what all methods share."""

    model: Literal["small_cnn", "resnet10"] = Field(description="the clients' network")
    num_clients: int = Field(ge=1, description="clients the training set is dealt to")
    clients_per_round: int = Field(ge=1, description="clients sampled each round")
    num_rounds: int = Field(ge=1, description="communication rounds")
    local_epochs: int = Field(ge=1, description="epochs over a client's data per round")
    batch_size: int = Field(ge=1, description="local batch size")
    learning_rate: float = Field(gt=0, description="SGD's rate")
    momentum: float = Field(ge=0, lt=1, description="SGD's momentum; the buffer starts anew each round")
    weight_decay: float = Field(ge=0, description="SGD's L2 penalty")
    augmentation: Literal["none", "crop", "crop-flip"] = Field(
        description="of training images: none, a random crop after padding by 1/8, or that and a random flip"
    )
    evaluate_on: Literal["test", "validation"] = Field(
        description="validation holds out a part of the training set: use it for every choice"
    )
    validation_fraction: float = Field(gt=0, lt=1, description="the part held out when evaluate_on is validation")


class FedAvg(Section):
    """McMahan et al., AISTATS 2017."""

    algorithm: Literal["fedavg"]


class FedDifRC(Section):
    """Wang et al., ICCV 2025."""

    algorithm: Literal["feddifrc"]
    tdcl_weight: float = Field(ge=0, description="weight of the text-driven contrastive loss; 0 switches it off")
    tdcl_targets: Literal["raw", "centred", "standardised"] = Field(description="scale of the prompted targets")
    tdcl_normalisation: Literal["none", "representation", "scalar"] = Field(
        description="what divides TDCL's cosine: nothing, the mean distance U per representation, or its batch mean"
    )
    temperature: float = Field(gt=0, description="TDCL's tau")
    ndcr_weight: float = Field(ge=0, description="weight of the consistency loss; 0 switches it off")
    ndcr_targets: Literal["raw", "centred", "standardised"] = Field(description="scale of the denoising targets")


class Dirichlet(Section):
    """Per-class Dirichlet over clients."""

    kind: Literal["dirichlet"]
    alpha: float = Field(gt=0, description="concentration; small is heterogeneous")
    min_samples: int = Field(ge=1, description="draw again until every client has this many samples")


class Sweep(Section):
    """The runs of `dvc repro` and the rows of the report: methods x partitions x seeds."""

    methods: list[Name] = Field(min_length=1)
    partitions: list[Name] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)


class Report(Section):
    """The page."""

    title: str = Field(min_length=1, description="heading of the page")


class Runtime(Section):
    """Speed, never numbers: DVC does not track this section."""

    device: str = Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")
    unet_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        description="(image, prompt) pairs per batch of the frozen model; auto fills a GPU's memory, and is 16 on the "
        "CPU, where batches are computed side by side"
    )
    compile: bool = Field(description="compile the frozen model (torch.compile): minutes once, faster passes on a GPU")
    cache_latents: bool = Field(description="keep the images' latents under .pipeline/ for the next extraction")


METHODS: tuple[type[Section], ...] = (FedAvg, FedDifRC)
PARTITIONS: tuple[type[Section], ...] = (Dirichlet,)
Method = Annotated[FedAvg | FedDifRC, Field(discriminator="algorithm")]
Partition = Dirichlet


class Params(Section):
    """All of params.yaml."""

    prepare_data: PrepareData
    prepare_backbone: PrepareBackbone
    extract_features: ExtractFeatures
    train_fl: TrainFL
    methods: dict[Name, Method] = Field(min_length=1)
    partitions: dict[Name, Partition] = Field(min_length=1)
    sweep: Sweep
    report: Report
    runtime: Runtime
