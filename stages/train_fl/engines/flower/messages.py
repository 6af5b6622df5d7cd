"""What the messages of a run hold, and named tensors as Flower's arrays.

    server -> node   weights (ArrayRecord)   broadcast (ArrayRecord, if the method has one)   order (ConfigRecord)
    node -> server   weights (ArrayRecord)   extras (ArrayRecord, if the method has some)     work (MetricRecord)

Flower's mods look for one ArrayRecord and one ConfigRecord: so there are no empty ones. A node may be of another
version, broken or hostile; what it sends is checked against the server's own tensors before it is added up.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from pipeline.errors import PipelineError
from stages.train_fl.methods import ClientUpdate, Metrics, Weights


@dataclass(frozen=True)
class Order:
    """What a node is asked to do.

    Attributes:
        key: of the run, 16 hexadecimal digits; the node's states are kept under it.
        number: the round, counted from 1.
        state_of: the last round whose update of this client was added up; 0: none.
    """

    key: str
    number: int
    state_of: int

    def record(self) -> ConfigRecord:
        """As it is sent."""
        return ConfigRecord({"key": self.key, "number": self.number, "state-of": self.state_of})

    @staticmethod
    def read(record: ConfigRecord) -> "Order":
        """As it came; the key names a folder on the node.

        Raises:
            PipelineError: it is no key of a run.
        """
        if not re.fullmatch("[0-9a-f]{16}", str(record["key"])):
            raise PipelineError(f"the server's order has a key that is none: {record['key']!r}")
        return Order(str(record["key"]), int(record["number"]), int(record["state-of"]))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Work:
    """What a node did: its update, the means of its losses, whether it keeps a state, and the seconds it took."""

    update: ClientUpdate
    losses: Metrics
    keeps_state: bool
    load_seconds: float
    train_seconds: float

    def content(self) -> RecordDict:
        """As it is sent."""
        numbers: dict[str, Any] = {
            "num-samples": self.update.num_samples,
            "num-steps": self.update.num_steps,
            "keeps-state": int(self.keeps_state),
            "load-seconds": self.load_seconds,
            "train-seconds": self.train_seconds,
            **{f"loss:{name}": value for name, value in self.losses.items()},
        }
        content = RecordDict({"weights": to_record(self.update.weights), "work": MetricRecord(numbers)})
        if self.update.extras:
            content["extras"] = to_record(self.update.extras)
        return content

    @staticmethod
    def read(content: RecordDict, like: Weights) -> "Work":
        """As it came.

        Args:
            content: of a node's answer.
            like: tensors with the names, shapes and types that its weights must have.

        Raises:
            PipelineError: it is no such answer, or holds what is not finite.
        """
        try:
            weights = to_tensors(content.array_records["weights"], like)
            extras = to_tensors(content.array_records["extras"]) if "extras" in content.array_records else {}
            return Work.of(weights, extras, content.metric_records["work"])
        except PipelineError:
            raise
        except Exception as error:  # bytes from elsewhere, read by several libraries: whatever they raise
            raise PipelineError(f"its answer is not an update ({error!r})") from None

    @staticmethod
    def of(weights: Weights, extras: Weights, record: Mapping[str, Any]) -> "Work":
        """From tensors and the numbers that came with them.

        Raises:
            PipelineError: nothing was trained, or it diverged.
        """
        numbers = {key: float(value) for key, value in record.items()}
        losses = {key.removeprefix("loss:"): value for key, value in numbers.items() if key.startswith("loss:")}
        num_samples, num_steps = int(numbers["num-samples"]), int(numbers["num-steps"])
        if num_samples <= 0 or num_steps <= 0:
            raise PipelineError(f"it trained on {num_samples} images in {num_steps} steps")
        if not all(np.isfinite(value) for value in losses.values()):
            raise PipelineError(f"training diverged there: its loss is {losses}; lower train_fl.learning_rate")
        update = ClientUpdate(weights, num_samples, num_steps, extras)
        seconds = numbers["load-seconds"], numbers["train-seconds"]
        return Work(update, losses, bool(numbers["keeps-state"]), *seconds)


def form(tensors: Weights) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Names, types and shapes."""
    return tuple((name, str(value.dtype), tuple(value.shape)) for name, value in sorted(tensors.items()))


def to_record(tensors: Weights) -> ArrayRecord:
    """Named tensors as arrays."""
    return ArrayRecord({name: Array(value.detach().cpu().contiguous().numpy()) for name, value in tensors.items()})


def to_tensors(record: ArrayRecord, like: Weights | None = None, device: str = "cpu") -> Weights:
    """Arrays as named tensors on `device`, in the order of `like`, if it is given.

    Raises:
        PipelineError: a name, a shape or a type is not that of `like`, or a value is not finite.
    """
    found = {name: np.array(array.numpy()) for name, array in record.items()}
    if like is not None and found.keys() != like.keys():
        odd = min(found.keys() ^ like.keys())
        raise PipelineError(f"its weights are of another model: {odd} is in one of both alone")
    tensors = {name: torch.from_numpy(found[name]) for name in (like or found)}
    for name, value in tensors.items():
        if like is not None and (value.shape, value.dtype) != (like[name].shape, like[name].dtype):
            raise PipelineError(
                f"its weights are of another model: {name} is {value.dtype} {tuple(value.shape)}, here "
                f"{like[name].dtype} {tuple(like[name].shape)}"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise PipelineError(f"its {name} is not finite: training diverged there; lower train_fl.learning_rate")
    return {name: value.to(device) for name, value in tensors.items()}
