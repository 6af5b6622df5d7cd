"""The local engine: one process, one device, clients in turn, weights handed over by reference.

Between rounds all there is to know is a `Progress`; every random draw is keyed by (seed, round, client). A run can
therefore stop after any round and go on from its Progress to the same bytes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from pipeline import seeding
from pipeline.errors import PipelineError
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


def run(
    method: Method, start: Progress, clients: list[ClientData], schedule: Schedule, device: str | None = None
) -> Iterator[Round]:
    """Runs a method and yields after every round.

    Args:
        method: the federated method.
        start: from `begin`, or the progress of an earlier round.
        clients: every client's data.
        schedule: rounds and sampling. Who takes part, and each client's batches, come from generators keyed by
            (seed, round, client), so that they depend neither on the method nor on the order of clients.
        device: where training runs; None: where the data are.

    Raises:
        PipelineError: a client's loss is not finite.
    """
    server, states = start.server, list(start.clients)
    for number in range(start.number + 1, schedule.num_rounds + 1):
        participants = sample_clients([c for c, data in enumerate(clients) if len(data)], schedule, number)
        started = time.perf_counter()
        load_seconds = 0.0
        updates: list[ClientUpdate] = []
        metrics: list[Metrics] = []
        for client in participants:
            batches = client_batches(clients[client], schedule, number, client, device)
            update, states[client], client_metrics = method.client_update(
                server.weights, server.broadcast, states[client], batches, schedule.learning_rate_of(number)
            )
            check_finite(client_metrics, client, number)
            load_seconds += batches.loading.seconds
            updates.append(update)
            metrics.append(client_metrics)
        trained = time.perf_counter()
        bytes_down = len(participants) * (num_bytes(server.weights) + num_bytes(server.broadcast))
        server, _ = method.server_update(server, updates)
        _wait(device)
        sizes = [update.num_samples for update in updates]
        yield Round(
            progress=Progress(number, server, list(states)),
            weights=method.reported_weights(server),
            participants=participants,
            num_samples=sum(sizes) * schedule.local_epochs,
            num_steps=sum(update.num_steps for update in updates),
            train_metrics={name: float(np.average([m[name] for m in metrics], weights=sizes)) for name in metrics[0]},
            bytes_down=bytes_down,
            bytes_up=sum(map(update_bytes, updates)),
            load_seconds=load_seconds,
            train_seconds=trained - started,
            aggregate_seconds=time.perf_counter() - trained,
        )


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
        raise PipelineError(
            f"training diverged: in round {number}, client {client}'s loss is {metrics}; lower train_fl.learning_rate"
        )


def num_bytes(tensors: Weights) -> int:
    """Of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())


def update_bytes(update: ClientUpdate) -> int:
    """All tensors that a client sends: its weights, and whatever else its method adds."""
    parts = [getattr(update, field.name) for field in fields(update)]
    return sum(num_bytes(part) for part in parts if isinstance(part, dict))


def _wait(device: str | None) -> None:
    """Lets a GPU finish, so that the seconds are those of the work."""
    if device is not None and device.startswith("cuda"):
        torch.cuda.synchronize(device)
