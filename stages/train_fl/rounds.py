"""Rounds of a federated run, shared by all engines: the schedule, the state between rounds, and client sampling.

Between rounds a run is a `Progress`, and every random draw is keyed by (seed, round, client). A run can therefore stop
after any round and resume from its Progress with identical results.
"""

from dataclasses import dataclass, fields

import numpy as np

from pipeline import seeding
from pipeline.errors import TrainingDiverged
from stages.train_fl.client_data import Augmentation, Batches, ClientData
from stages.train_fl.methods import ClientState, ClientUpdate, Method, Metrics, ServerState, Weights


@dataclass(frozen=True)
class Schedule:
    """How many rounds, who takes part, and how long and fast clients train."""

    num_rounds: int
    clients_per_round: int
    local_epochs: int
    batch_size: int
    learning_rate: float
    learning_rate_decay: float
    augmentation: Augmentation
    seed: int

    def learning_rate_of(self, number: int) -> float:
        """The rate of round `number`, counted from 1: decayed once after every round."""
        return self.learning_rate * self.learning_rate_decay ** (number - 1)


@dataclass(frozen=True)
class Progress:
    """A federation between two rounds: rounds done, the server's state, and every client's."""

    number: int
    server: ServerState
    clients: list[ClientState]


@dataclass(frozen=True)
class Round:
    """What one round did.

    The global model to report, means over participants, the bytes the server sent to them and they sent back, and
    seconds; `load_seconds` is the part of `train_seconds` that went into gathering and augmenting batches.
    """

    progress: Progress
    weights: Weights
    participants: list[int]
    num_samples: int
    num_steps: int
    train_metrics: Metrics
    bytes_down: int
    bytes_up: int
    load_seconds: float
    train_seconds: float
    aggregate_seconds: float

    @property
    def number(self) -> int:
        """The round, counted from 1."""
        return self.progress.number


def begin(method: Method, weights: Weights, num_clients: int) -> Progress:
    """The federation before its first round."""
    return Progress(0, method.init_server(weights), [method.init_client(weights) for _ in range(num_clients)])


def client_batches(data: ClientData, schedule: Schedule, number: int, client: int, device: str | None) -> Batches:
    """The batches of one client in one round, the same under every engine."""
    generator = seeding.torch_generator(schedule.seed, "batches", number, client)
    return Batches(data, schedule.local_epochs, schedule.batch_size, schedule.augmentation, generator, device)


def sample_clients(with_data: list[int], schedule: Schedule, number: int) -> list[int]:
    """Ids of the round's participants, ascending, drawn uniformly among the clients that have data (ascending ids)."""
    rng = seeding.numpy_generator(schedule.seed, "client sampling", number)
    drawn = rng.permutation(with_data)[: schedule.clients_per_round]
    return sorted(int(client) for client in drawn)


def check_finite(metrics: Metrics, client: int, number: int) -> None:
    """Checks a client's losses.

    Raises:
        PipelineError: one is not a finite number.
    """
    if not all(np.isfinite(value) for value in metrics.values()):
        raise TrainingDiverged(
            f"training diverged: in round {number}, client {client}'s loss is {metrics}; lower train_fl.learning_rate"
        )


def num_bytes(tensors: Weights) -> int:
    """Of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())


def update_bytes(update: ClientUpdate) -> int:
    """All tensors that a client sends: its weights, and whatever else its method adds."""
    parts = [getattr(update, field.name) for field in fields(update)]
    return sum(num_bytes(part) for part in parts if isinstance(part, dict))
