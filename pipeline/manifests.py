"""The JSON files of a run in results/<method>-<partition>/s<seed>, as typed models: training writes, the report reads.

config.json      `RunConfig`     the settings that determine the run, what it was made from, and the software
metrics.json     `RunMetrics`    the main results, which `dvc metrics show` prints
details.json     `RunDetails`    best accuracy, seconds, bytes
partition.json   `RunPartition`  which samples and labels each client has; not of nodes with images of their own
"""

import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import DataError
from pipeline.io.system_errors import reading


class _Manifest(BaseModel):
    """Fields of a newer version are kept, not rejected."""

    model_config = ConfigDict(frozen=True, extra="allow")


class DatasetReference(_Manifest):
    """The data set that a run was trained on; without a hash if each node has its own."""

    name: str
    hash: str | None = None


class RunConfig(_Manifest):
    """config.json. `method` and `partition` hold a name besides the settings of that entry in params.yaml."""

    method: dict[str, Any]
    partition: dict[str, Any]
    train_fl: dict[str, Any]
    seed: int
    dataset: DatasetReference
    features: str | None = None  # fingerprint of the feature set
    synthetic: str | None = None  # hash of the generated images
    seen_images: int = 0  # of the data set, on which the backbone was trained that guided the run
    feature_noise: float = 0  # of the features that guided the run, in standard deviations
    agreed: dict[str, Any] = {}  # what nodes with images of their own have in common
    provenance: dict[str, Any] = {}


class RunMetrics(_Manifest):
    """metrics.json. Methods may add numbers of their own; `mean_domain_accuracy` needs two domains or more."""

    mean_last5_accuracy: float
    final_accuracy: float
    mean_domain_accuracy: float | None = None


class RunDetails(_Manifest):
    """details.json. `domain_accuracy` is empty for runs over nodes with images of their own."""

    best_accuracy: float
    wall_seconds: float
    seconds: dict[str, float]  # load, train, aggregate, evaluate
    samples_per_second: float
    bytes_down: int
    bytes_up: int
    domain_accuracy: dict[str, float] = {}


class RunPartition(_Manifest):
    """partition.json. Counts are per client and class; `clients` lists positions in the training split."""

    class_names: list[str]
    label_counts: list[list[int]]
    synthetic_counts: list[list[int]]
    heterogeneity: dict[str, float | None]
    clients: list[list[int]]


M = TypeVar("M", bound=_Manifest)


def run_name(folder: Path) -> str:
    """Return the name of the run in a folder: "fedavg-dir05-s0" in results/fedavg-dir05/s0, elsewhere the folder's."""
    folder = folder.absolute()
    return f"{folder.parent.name}-{folder.name}" if re.fullmatch(r"s\d+", folder.name) else folder.name


def read(file: Path, model: type[M]) -> M:
    """Read a manifest of class `model` from a JSON file.

    Raise FileNotFoundError if there is none, DataError if its content is invalid, SystemRefusal if it is unreadable.
    """
    with reading(file):
        text = file.read_bytes()
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        detail = f"{where}: {problem['msg']}" if where else problem["msg"]
        raise DataError(
            f"{file} is damaged ({detail}). Train the run again, or restore it with `dvc checkout`."
        ) from None
