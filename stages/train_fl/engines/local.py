"""The local engine: one process, one device, clients in turn, weights passed by reference."""

import time
from collections.abc import Iterator

import numpy as np
import torch

from stages.train_fl.client_data import ClientData
from stages.train_fl.methods import ClientUpdate, Method, Metrics
from stages.train_fl.rounds import (
    Progress,
    Round,
    Schedule,
    check_finite,
    client_batches,
    num_bytes,
    sample_clients,
    update_bytes,
)


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


def _wait(device: str | None) -> None:
    """Lets a GPU finish, so that the seconds are those of the work."""
    if device is not None and device.startswith("cuda"):
        torch.cuda.synchronize(device)
