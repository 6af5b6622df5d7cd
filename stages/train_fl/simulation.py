"""Federated training from arrays in memory, for notebooks and scripts: no params.yaml and no files.

Only clients' states that memory has no room for (`client_states`) go to a temporary folder.
"""

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from tabulate import tabulate
from torch import Tensor

from pipeline import devices, threads
from pipeline.errors import ConfigError, DataError
from pipeline.feature_store import FeatureSet
from pipeline.settings.params import Guidance, Section, TrainFL
from stages.train_fl import feature_check, methods, session
from stages.train_fl.client_data import ClientData
from stages.train_fl.client_states import ClientStates, memory_limit
from stages.train_fl.data import HeldOut
from stages.train_fl.engines import workers
from stages.train_fl.engines.local import LocalEngine
from stages.train_fl.guidance import GuidanceSource
from stages.train_fl.methods import Method
from stages.train_fl.models import FLModel
from stages.train_fl.records import RoundRow, round_row
from stages.train_fl.rounds import Schedule

DEFAULTS: dict[str, Any] = {
    "model": "small_cnn", "normalisation": "batch", "precision": "float32", "projection_dim": None,
    "clients_per_round": 5, "num_rounds": 25, "local_epochs": 5, "batch_size": 64,
    "learning_rate": 0.01, "learning_rate_decay": 1.0, "momentum": 0.9, "weight_decay": 0.00001,
    "gradient_clipping": None, "augmentation": "none", "allow_seen_images": False,
}  # fmt: skip
"""The settings of `train_fl` that `simulate` accepts, with the values of params.yaml."""


@dataclass(frozen=True)
class Samples:
    """Samples of one client, or held-out samples; arrays or tensors.

    Attributes:
        images: uint8, or float in [0, 1] (stored with 8 bits); (N, H, W, 3), (N, H, W, 1) or (N, H, W).
        labels: Integers (N,), counted from 0.
        features: The feature set of the images, for methods with guidance.
        rows: Integers (N,), the row of each image in `features`.
    """

    images: Any
    labels: Any
    features: FeatureSet | None = None
    rows: Any = None


@dataclass(frozen=True)
class History:
    """The outcome of `simulate`; prints as a table.

    Attributes:
        rows: One per round: round, accuracy, loss, train_<loss>, num_clients, num_samples, bytes_down, bytes_up.
        model: The network with the final global weights.
    """

    rows: list[RoundRow]
    model: FLModel

    def __str__(self) -> str:
        """Return the rows as a table."""
        return str(tabulate(self.rows, headers="keys", floatfmt=".4f"))

    __repr__ = __str__


def simulate(
    method: type[Method] | Section,
    clients: Sequence[Samples],
    held_out: Samples,
    *,
    seed: int = 0,
    device: str = "auto",
    num_workers: int | Literal["auto"] = "auto",
    **settings: Any,
) -> History:
    """Train a federated method from arrays in memory.

    Args:
        method: A method class with its default settings, for example FedDifRC or your own subclass of FedAvg; or the
            settings of a method, for example FedDifRC.Settings(ndcr_weight=0).
        clients: The clients' training samples.
        held_out: Samples to evaluate on after every round.
        seed: Seed of the initial weights, client sampling and batches.
        device: "auto", "cpu" or "cuda".
        num_workers: How many clients to train side by side, on a CPU each in a process with one thread, on a GPU each
            in a stream; "auto": as many as cores, or four. It does not affect results.
        **settings: Settings of `train_fl` that differ from `DEFAULTS`, for example num_rounds or learning_rate.

    Returns:
        The rows of all rounds, and the final network.

    Raises:
        ConfigError: A setting is unknown or invalid, or a method with guidance gets clients without features.
        DataError: There are no images, or images, labels and rows do not fit each other.
        FeatureSetError: A client's feature set is damaged, lacks its rows, does not suit the method, or is of images
            that the backbone was trained on.
        TrainingDiverged: A loss is not a finite number.
    """
    params, device = _train_fl(settings, len(clients)), devices.resolve(device, "device")
    section, kind = _method(method)
    methods.check(kind, section, params.augmentation, kind.__name__)
    guidance = methods.guidance_of(section)
    guided = [_client(own, guidance, kind, params.allow_seen_images) for own in clients]
    data, test = [own.to(device) for own, _ in guided], _client(held_out, None, kind)[0].to(device)
    for name, count in (("clients have", sum(map(len, data))), ("held_out has", len(test))):
        if not count:
            raise DataError(f"{name} no images. Pass at least one.")
    held = HeldOut(test.images, test.labels, torch.zeros_like(test.labels))
    num_classes = 1 + max(int(own.labels.max()) for own in [*data, test] if len(own))
    model, made = session.build(params, section, kind, num_classes, guided[0][1], len(data), seed, device)
    count = workers.resolve(num_workers, device)
    evaluator = session.evaluator_of(made, data, held, count)
    engine = LocalEngine(made, data, Schedule.of(params, seed), device, count)
    start = engine.begin(session.weights_of(model))
    with threads.single(), tempfile.TemporaryDirectory() as folder:
        states = ClientStates(Path(folder), memory_limit(device), device)
        with contextlib.closing(engine.rounds(start, states)) as rounds:
            rows = [round_row(done, session.score_round(done, model, evaluator)) for done in rounds]
    return History(rows, model)


def _method(method: Any) -> tuple[Section, type[Method]]:
    """Return the settings and the class of a method that is given as either."""
    if isinstance(method, Section):
        return method, methods.method_class(method)
    if isinstance(method, type) and issubclass(method, Method) and hasattr(method, "Settings"):
        return method.Settings(), method
    raise ConfigError(
        f"{method!r} is not a method. Pass a class such as FedAvg, or settings such as FedAvg.Settings()."
    )


def _train_fl(settings: dict[str, Any], num_clients: int) -> TrainFL:
    """Check the settings against the types and ranges of params.yaml."""
    if unknown := settings.keys() - DEFAULTS.keys():
        raise ConfigError(f"unknown setting {min(unknown)}. Use one of {', '.join(DEFAULTS)}.")
    unused = {"imbalance_factor": 1.0, "balance_with_synthetic": "none"}  # settings of prepared data sets
    unused |= {"evaluate_on": "test", "validation_fraction": 0.2}
    try:
        return TrainFL(**{**DEFAULTS, **settings, **unused, "num_clients": num_clients})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"invalid setting {where} ({problem['msg']}). Choose another value.") from None


def _client(
    samples: Samples, guidance: Guidance | None, kind: type[Method], allow_seen_images: bool = False
) -> tuple[ClientData, int | None]:
    """Return a client's data and the length of its guidance targets; without guidance None."""
    images = _pixels(samples.images)
    labels = _integers("labels", samples.labels, len(images))
    if guidance is None:
        return ClientData(images, torch.from_numpy(labels)), None
    features = samples.features
    if features is None or samples.rows is None:
        raise ConfigError("the method has guidance, but a client has no features. Pass Samples(..., features, rows).")
    feature_check.check_unseen(features, allow_seen_images)
    rows = _integers("rows", samples.rows, len(images))
    if not np.array_equal(features.read(rows).label, labels):
        raise DataError("the labels differ from those in the feature set. Check that `rows` are the images' own rows.")
    feature_check.check_method(features, rows, guidance, kind.needs_labels, kind.__name__)
    source = GuidanceSource(features, guidance)
    return ClientData(images, torch.from_numpy(labels), source.read(rows)), source.num_dims


def _integers(name: str, values: Any, count: int) -> np.ndarray:
    """Return `count` integers from 0 as int64."""
    array = np.asarray(values)
    if array.shape != (count,) or (count and (array.dtype.kind not in "iu" or array.min() < 0)):
        problem = f"{name} do not fit the images ({array.dtype} of shape {array.shape})"
        raise DataError(f"{problem}. Pass {count} integers, 0 or more, one per image.")
    return array.astype(np.int64)


def _pixels(images: Any) -> Tensor:
    """Return the images as uint8 (N, 3, H, W)."""
    array = np.asarray(images)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise DataError(f"images have shape {array.shape}. Pass (N, H, W), (N, H, W, 1) or (N, H, W, 3).")
    if np.issubdtype(array.dtype, np.floating):
        if array.size and not (array.min() >= 0 and array.max() <= 1):
            raise DataError("float images are not from 0 to 1. Divide them by their largest value.")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise DataError(f"images are {array.dtype}. Pass uint8 or float.")
    array = np.broadcast_to(array, (*array.shape[:3], 3)).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.array(array, order="C"))
