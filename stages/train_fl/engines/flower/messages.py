"""The content of a run's messages, and named tensors as Flower's arrays.

    server -> node   weights (ArrayRecord), request (ConfigRecord), broadcast (ArrayRecord, if the method has one)
    node -> server   weights (ArrayRecord), result (MetricRecord), extras (ArrayRecord, if the method has some)

Flower's mods expect one ArrayRecord and one ConfigRecord, so records are never empty. A node may run another version,
be broken or hostile: its replies are checked against the server's own tensors before they are aggregated.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from pipeline.errors import DataError, PipelineError, TrainingDiverged
from stages.train_fl.methods import ClientUpdate, Metrics, Weights


@dataclass(frozen=True)
class TrainRequest:
    """The server's request to train."""

    run_key: str  # names the run, 16 hexadecimal digits; the node keeps the client's states under it
    number: int  # the round, counted from 1
    state_round: int  # the last round whose update of this client was aggregated; 0: none

    def record(self) -> ConfigRecord:
        """Return it as a record of a message."""
        return ConfigRecord({"run-key": self.run_key, "number": self.number, "state-round": self.state_round})

    @staticmethod
    def read(content: RecordDict) -> "TrainRequest":
        """Read it from a message; DataError if the run key, which names a folder on the node, is invalid."""
        record = content.config_records["request"]
        if not re.fullmatch("[0-9a-f]{16}", str(record["run-key"])):
            raise DataError(f"the server's request has an invalid run key ({record['run-key']!r})")
        return TrainRequest(str(record["run-key"]), int(record["number"]), int(record["state-round"]))  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainReply:
    """A node's reply: its update, its mean losses, whether it keeps a state for the next round, and its seconds."""

    update: ClientUpdate
    losses: Metrics
    keeps_state: bool
    load_seconds: float
    train_seconds: float

    def content(self) -> RecordDict:
        """Return it as the content of a message."""
        numbers: dict[str, Any] = {
            "num-samples": self.update.num_samples,
            "num-steps": self.update.num_steps,
            "keeps-state": int(self.keeps_state),
            "load-seconds": self.load_seconds,
            "train-seconds": self.train_seconds,
            **{f"loss:{name}": value for name, value in self.losses.items()},
        }
        content = RecordDict({"weights": to_record(self.update.weights), "result": MetricRecord(numbers)})
        if self.update.extras:
            content["extras"] = to_record(self.update.extras)
        return content

    @staticmethod
    def read(content: RecordDict, like: Weights) -> "TrainReply":
        """Read it from a message; `like` has the names, shapes and types that its weights must have.

        Raises:
            DataError: It is not a valid reply.
            TrainingDiverged: A weight or a loss is not finite.
        """
        try:
            weights = to_tensors(content.array_records["weights"], like)
            extras = to_tensors(content.array_records["extras"]) if "extras" in content.array_records else {}
            numbers = {key: float(value) for key, value in content.metric_records["result"].items()}  # type: ignore[arg-type]
            losses = {key.removeprefix("loss:"): value for key, value in numbers.items() if key.startswith("loss:")}
            num_samples, num_steps = int(numbers["num-samples"]), int(numbers["num-steps"])
            keeps_state, seconds = bool(numbers["keeps-state"]), (numbers["load-seconds"], numbers["train-seconds"])
        except PipelineError:
            raise
        except Exception as error:  # untrusted bytes, parsed by several libraries: any exception means invalid
            raise DataError(f"invalid reply ({error!r})") from None
        if num_samples <= 0 or num_steps <= 0:
            raise DataError(f"invalid reply (trained on {num_samples} images in {num_steps} steps)")
        if not all(np.isfinite(value) for value in losses.values()):
            raise TrainingDiverged(f"training diverged (losses {losses}). Lower train_fl.learning_rate.")
        return TrainReply(ClientUpdate(weights, num_samples, num_steps, extras), losses, keeps_state, *seconds)


def signature(tensors: Weights) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Return names, types and shapes, sorted by name."""
    return tuple((name, str(value.dtype), tuple(value.shape)) for name, value in sorted(tensors.items()))


def to_record(tensors: Weights) -> ArrayRecord:
    """Convert named tensors to arrays."""
    return ArrayRecord({name: Array(value.detach().cpu().contiguous().numpy()) for name, value in tensors.items()})


def to_tensors(record: ArrayRecord, like: Weights | None = None, device: str = "cpu") -> Weights:
    """Convert arrays to named tensors on `device`, in the order of `like`; if it is None, accept any.

    Raises:
        DataError: A name, a shape or a type differs from `like`.
        TrainingDiverged: A value is not finite.
    """
    found = {name: np.array(array.numpy()) for name, array in record.items()}
    if like is not None and found.keys() != like.keys():
        missing, extra = sorted(like.keys() - found.keys()), sorted(found.keys() - like.keys())
        raise DataError(f"weights of another model ({f'no {missing[0]}' if missing else f'unexpected {extra[0]}'})")
    tensors = {name: torch.from_numpy(found[name]) for name in (like or found)}
    for name, value in tensors.items():
        if like is not None and (value.shape, value.dtype) != (like[name].shape, like[name].dtype):
            raise DataError(
                f"weights of another model ({name} is {value.dtype} {tuple(value.shape)}, expected {like[name].dtype} "
                f"{tuple(like[name].shape)})"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise TrainingDiverged(f"training diverged ({name} is not finite). Lower train_fl.learning_rate.")
    return {name: value.to(device) for name, value in tensors.items()}
