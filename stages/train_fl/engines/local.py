"""The local engine: one process, one device, clients in turn, weights handed over by reference."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline import seeding
from pipeline.errors import PipelineError
from stages.train_fl.client_data import Augmentation, Batches, ClientData
from stages.train_fl.methods import Method, Metrics, ServerState, Weights


@dataclass(frozen=True)
class Schedule:
    """How many rounds, who takes part, and how long clients train."""

    num_rounds: int
    clients_per_round: int
    local_epochs: int
    batch_size: int
    learning_rate: float
    augmentation: Augmentation
    seed: int


@dataclass(frozen=True)
class Round:
    """What one round did: the new global weights, its means over participants, and its seconds."""

    number: int
    weights: Weights
    participants: list[int]
    num_samples: int
    num_steps: int
    train_metrics: Metrics
    train_seconds: float
    aggregate_seconds: float


def run(method: Method, weights: Weights, clients: list[ClientData], schedule: Schedule) -> Iterator[Round]:
    """Runs a method and yields after every round.

    Args:
        method: the federated method.
        weights: initial global weights, on the device.
        clients: every client's data, on the device.
        schedule: rounds and sampling. Who takes part, and each client's batches, come from generators keyed by
            (seed, round, client), so that they depend neither on the method nor on the order of clients.

    Raises:
        PipelineError: a client's loss is not finite.
    """
    server: ServerState = method.init_server(weights)
    states = [method.init_client(weights) for _ in clients]
    for number in range(1, schedule.num_rounds + 1):
        participants = sample_clients(clients, schedule, number)
        started = time.perf_counter()
        updates, metrics = [], []
        for client in participants:
            generator = seeding.torch_generator(schedule.seed, "batches", number, client)
            batches = Batches(
                clients[client], schedule.local_epochs, schedule.batch_size, schedule.augmentation, generator
            )
            update, states[client], client_metrics = method.client_update(
                server.weights, server.broadcast, states[client], batches, schedule.learning_rate
            )
            _check_finite(client_metrics, client, number)
            updates.append(update)
            metrics.append(client_metrics)
        trained = time.perf_counter()
        server, _ = method.server_update(server, updates)
        sizes = [update.num_samples for update in updates]
        yield Round(
            number=number,
            weights=method.reported_weights(server),
            participants=participants,
            num_samples=sum(sizes) * schedule.local_epochs,
            num_steps=sum(update.num_steps for update in updates),
            train_metrics={name: float(np.average([m[name] for m in metrics], weights=sizes)) for name in metrics[0]},
            train_seconds=trained - started,
            aggregate_seconds=time.perf_counter() - trained,
        )


def sample_clients(clients: list[ClientData], schedule: Schedule, number: int) -> list[int]:
    """Ids of the round's participants, ascending, drawn uniformly among the clients that have data."""
    rng = seeding.numpy_generator(schedule.seed, "client sampling", number)
    with_data = [client for client, data in enumerate(clients) if len(data)]
    drawn = rng.permutation(with_data)[: schedule.clients_per_round]
    return sorted(int(client) for client in drawn)


def _check_finite(metrics: Metrics, client: int, number: int) -> None:
    if not all(np.isfinite(value) for value in metrics.values()):
        raise PipelineError(
            f"training diverged: in round {number}, client {client}'s loss is {metrics}; lower train_fl.learning_rate"
        )
