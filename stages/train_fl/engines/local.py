"""The local engine: one process, one device, clients in turn, weights passed by reference."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stages.train_fl import rounds
from stages.train_fl.client_data import ClientData
from stages.train_fl.methods import ClientUpdate, Method, Metrics, Weights
from stages.train_fl.rounds import Progress, Round, Schedule


@dataclass(frozen=True)
class LocalEngine:
    """The rounds of a method over clients whose data are here: a `session.Engine`."""

    method: Method
    clients: list[ClientData]
    schedule: Schedule
    device: str
    checkpoint_every: int = 1
    name: str = "local"

    def begin(self, weights: Weights) -> Progress:
        """Return the state before the first round, with these initial weights."""
        return rounds.begin(self.method, weights, len(self.clients))

    def rounds(self, start: Progress) -> Iterator[Round]:
        """Run all rounds after `start`."""
        return run(self.method, start, self.clients, self.schedule, self.device)


def run(
    method: Method, start: Progress, clients: list[ClientData], schedule: Schedule, device: str | None = None
) -> Iterator[Round]:
    """Run a method from `start`, which `begin` or an earlier round gave, and yield after every round.

    Participants and batches are drawn from generators keyed by (seed, round, client), so they depend neither on the
    method nor on the order of clients. Without a `device`, clients train where their data are. A loss that is not
    finite raises TrainingDiverged.
    """
    server, states = start.server, list(start.clients)
    for number in range(start.number + 1, schedule.num_rounds + 1):
        participants = rounds.sample_clients([c for c, data in enumerate(clients) if len(data)], schedule, number)
        started = time.perf_counter()
        load_seconds, updates, metrics = 0.0, list[ClientUpdate](), list[Metrics]()
        for client in participants:
            batches = rounds.client_batches(clients[client], schedule, number, client, device)
            update, states[client], client_metrics = method.client_update(
                server.weights, server.broadcast, states[client], batches, schedule.learning_rate_of(number)
            )
            rounds.check_finite(client_metrics, client, number)
            load_seconds += batches.loading.seconds
            updates.append(update)
            metrics.append(client_metrics)
        trained = time.perf_counter()
        bytes_down = len(participants) * (rounds.num_bytes(server.weights) + rounds.num_bytes(server.broadcast))
        server, _ = method.server_update(server, updates)
        if device is not None and device.startswith("cuda"):
            torch.cuda.synchronize(device)  # so that the seconds are those of the work
        sizes = [update.num_samples for update in updates]
        yield Round(
            progress=Progress(number, server, list(states)),
            weights=method.reported_weights(server),
            participants=participants,
            num_samples=sum(sizes) * schedule.local_epochs,
            train_metrics=rounds.mean_metrics(metrics, sizes),
            bytes_down=bytes_down,
            bytes_up=sum(map(rounds.update_bytes, updates)),
            load_seconds=load_seconds,
            train_seconds=trained - started,
            aggregate_seconds=time.perf_counter() - trained,
        )
