"""Typed configuration: params.yaml, one section a stage, checked before anything runs.

The file is the only place for values: no key has a default here, so what a run used can be read in one place. An
unknown key, a missing one, a wrong type or a value out of range is one line that names file, key, value and what
is allowed. The file is read as YAML 1.2, as DVC reads it (PyYAML's 1.1 would make `1e-4` a string).
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from pipeline.errors import PipelineError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Names a folder, a DVC stage or a run: letters, digits, - and _."""


class Section(BaseModel):
    """A section of params.yaml: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class PrepareData(Section):
    """Images -> data/datasets/<name>."""

    name: Name = Field(description="names data/datasets/<name>")
    source: Literal["digits", "cifar10", "folder"] = Field(
        description="digits (scikit-learn), cifar10 (torchvision) or folder (ImageFolder layout)"
    )
    path: str | None = Field(description="folder: its root; cifar10: where torchvision keeps its download")
    image_size: int = Field(ge=8, le=1024, description="images are stored at this height and width, pixels")
    train_subset: int | None = Field(ge=1, description="keep this many training images, stratified by class")
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
    up_block_indices: list[Annotated[int, Field(ge=0, le=7)]] = Field(
        min_length=1, description="decoder blocks to read, counted from 0; 1,2,3 are the paper's layers 2-4"
    )
    dims: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="PCA dimensions kept per block, at most its channels"
    )
    image_size: int = Field(ge=8, le=2048, description="images are resized to this before encoding, pixels")
    prompt_template: str = Field(pattern=r"\{class_name\}", description="conditional prompt; {class_name} is filled in")
    denoise_prompt: str = Field(description="generic prompt of the denoising representation")
    negatives: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        description="non-matching prompts per image: all other classes, or the K nearest by text embedding"
    )
    noise_seed: int = Field(ge=0, description="seed of the per-image noise")
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
    unet_batch_size: int = Field(ge=1, description="(image, prompt) pairs per UNet pass")


Method = Annotated[FedAvg | FedDifRC, Field(discriminator="algorithm")]


class Params(Section):
    """All of params.yaml."""

    prepare_data: PrepareData
    prepare_backbone: PrepareBackbone
    extract_features: ExtractFeatures
    train_fl: TrainFL
    methods: dict[Name, Method] = Field(min_length=1)
    partitions: dict[Name, Dirichlet] = Field(min_length=1)
    sweep: Sweep
    report: Report
    runtime: Runtime


class Config:
    """Checked parameters and the layout of the project's files, relative to the folder of params.yaml."""

    def __init__(self, params: Params, root: Path) -> None:
        """Holds `params` for a project whose files stand under `root`."""
        self.params = params
        self.root = root

    @property
    def dataset_dir(self) -> Path:
        """The prepared data set."""
        return self.root / "data" / "datasets" / self.params.prepare_data.name

    @property
    def backbone_dir(self) -> Path:
        """The frozen model's weights, which neither git nor DVC tracks."""
        return self.root / "models" / self.params.prepare_backbone.name

    @property
    def backbone_manifest(self) -> Path:
        """What the frozen model is: the file that DVC tracks in place of the weights."""
        return self.root / "data" / "backbones" / f"{self.params.prepare_backbone.name}.json"

    @property
    def features_dir(self) -> Path:
        """The cached feature set: one folder per data set, backbone and timestep."""
        p = self.params
        set_name = f"{p.prepare_data.name}-{p.prepare_backbone.name}-t{p.extract_features.timestep}"
        return self.root / "data" / "features" / set_name

    @property
    def results_dir(self) -> Path:
        """One folder a run."""
        return self.root / "results"

    def run_dir(self, method: str, partition: str, seed: int) -> Path:
        """The folder of one run of the sweep."""
        return self.results_dir / f"{method}-{partition}-s{seed}"

    def settings(self, section: Literal["methods", "partitions"], name: str) -> Section:
        """The settings of a named method or partition.

        Raises:
            PipelineError: there is no such name; the message lists those there are.
        """
        known: Mapping[str, Section] = getattr(self.params, section)
        if name not in known:
            raise PipelineError(f"params.yaml has no {section}.{name}; it has {', '.join(known)}")
        return known[name]


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads and checks params.yaml.

    Args:
        path: the file.
        overrides: dotted key -> value, put over the file's values for this run ("train_fl.num_rounds": 3).

    Raises:
        PipelineError: the file is missing or not YAML, or a key is unknown, missing, of a wrong type or range.
    """
    values = _read_yaml(path)
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    try:
        return Config(Params.model_validate(values), path.resolve().parent)
    except ValidationError as error:
        lines = [_explain(path, detail) for detail in error.errors()]
        raise PipelineError("\n".join(lines)) from None


def parse_value(text: str) -> Any:
    """A value typed on the command line, read as it would be in params.yaml; an empty text is an empty string."""
    from ruamel.yaml import YAML, YAMLError

    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return text
    return text if value is None and text not in ("null", "~") else value


def _read_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML, YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing: run in the project's folder, or name the file by --params") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} cannot be read: {error}") from None
    except YAMLError as error:
        raise PipelineError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise PipelineError(f"{path} must hold sections (prepare_data, ...), not {type(values).__name__}")
    return values


def _set(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    *parents, key = dotted_key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise PipelineError(f"cannot set {dotted_key}: {parent} is a value, not a section")
    values[key] = value


def _explain(path: Path, detail: Mapping[str, Any]) -> str:
    """One line of the form `params.yaml: train_fl.batch_size = 0: input should be greater than or equal to 1`."""
    location = [str(part) for part in detail["loc"] if not str(part).startswith(("constrained-", "literal[", "int"))]
    if len(location) > 2 and location[0] == "methods":
        location = [*location[:2], *location[3:]]  # pydantic names the union's branch here
    key = ".".join(location)
    kind, message = detail["type"], detail["msg"][0].lower() + detail["msg"][1:]
    if kind == "missing":
        return f"{path}: {key} is missing"
    if kind == "extra_forbidden":
        allowed = _allowed_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(allowed)}"
        return f"{path}: {key} is not a known key; {hint}"
    return f"{path}: {key} = {detail['input']!r}: {message}"


def _allowed_keys(section: list[str]) -> list[str]:
    if not section:
        return list(Params.model_fields)
    if section[0] in ("methods", "partitions"):
        models: tuple[type[Section], ...] = (FedAvg, FedDifRC) if section[0] == "methods" else (Dirichlet,)
        return sorted({name for model in models for name in model.model_fields})
    annotation = Params.model_fields[section[0]].annotation
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, Section) else []
