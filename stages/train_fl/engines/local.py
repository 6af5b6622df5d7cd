"""The local engine: all clients on this machine, side by side on the cores of a CPU or the streams of a GPU."""

import copy
import functools
import time
from collections.abc import Generator
from dataclasses import dataclass

import torch

from pipeline.errors import PipelineError
from stages.train_fl import rounds
from stages.train_fl.client_data import ClientData
from stages.train_fl.client_states import ClientStates
from stages.train_fl.engines import workers
from stages.train_fl.methods import ClientState, ClientUpdate, Method, Metrics, Weights
from stages.train_fl.rounds import Progress, Round, Schedule


@dataclass(frozen=True)
class LocalEngine:
    """The rounds of a method over clients whose data are here: a `session.Engine`."""

    method: Method
    clients: list[ClientData]
    schedule: Schedule
    device: str
    num_workers: int = 1  # from `workers.resolve`
    checkpoint_every: int = 1
    name: str = "local"
    holds_states: bool = True

    def begin(self, weights: Weights) -> Progress:
        """Return the state before the first round, with these initial weights."""
        return rounds.begin(self.method, weights)

    def rounds(self, start: Progress, states: ClientStates | None) -> Generator[Round, None, None]:
        """Run all rounds after `start`."""
        return run(self.method, start, self.clients, self.schedule, self.device, self.num_workers, states)


def run(
    method: Method,
    start: Progress,
    clients: list[ClientData],
    schedule: Schedule,
    device: str | None = None,
    num_workers: int = 1,
    states: ClientStates | None = None,
) -> Generator[Round, None, None]:
    """Run a method from `start`, which `begin` or an earlier round gave, and yield after every round.

    Participants and batches are drawn from generators keyed by (seed, round, client), and updates are aggregated in the
    order of clients, so results do not depend on the number of workers. Without a `device`, clients train where their
    data are; without `states`, which has the states that `start` names, clients' states stay in memory.

    Raises:
        TrainingDiverged: A loss is not finite.
        PipelineError: A client's state cannot be written, or read again.
    """

    def train(own: Method, shared: tuple[int, Weights, Weights], item: tuple[int, ClientState | None]) -> _Trained:
        """Run one client's update in round `number`."""
        (number, weights, broadcast), (client, state) = shared, item
        batches = rounds.client_batches(clients[client], schedule, number, client, device)
        arguments = weights, broadcast, state, batches, schedule, number, client, seeded
        return _Trained(*rounds.update_client(own, *arguments), batches.loading.seconds)

    progress, states = start, states or ClientStates()
    with_data = [client for client, data in enumerate(clients) if len(data)]
    num_workers = max(1, min(num_workers, schedule.clients_per_round, len(with_data)))
    if device is not None and device.startswith("cuda"):
        # Several threads would draw from the global generator in any order, so others than these train one by one.
        seeded = not method.capturable
        copies = [method, *(copy.deepcopy(method) for _ in range(num_workers - 1))] if not seeded else [method]
        num_workers = len(copies)
        opened = workers.on_streams([functools.partial(train, own) for own in copies], device)
    else:
        seeded = True
        model_bytes = rounds.num_bytes(start.server.weights) + rounds.num_bytes(start.server.broadcast)
        memory = 4 * model_bytes  # a client's update and state
        opened = workers.opened(num_workers, functools.partial(train, method), memory)
    with opened as train_all:
        for number in range(start.number + 1, schedule.num_rounds + 1):
            server = progress.server
            participants = rounds.sample_clients(with_data, schedule, number)
            started = time.perf_counter()
            largest_first = sorted(participants, key=lambda client: -len(clients[client]))  # so that all end together
            items = [(client, _state(states, progress, client)) for client in largest_first]
            results = train_all((number, server.weights, server.broadcast), items)
            trained = dict(sorted(zip(largest_first, results, strict=True)))
            for client, result in trained.items():
                rounds.check_finite(result.metrics, client, number)
                states.save(client, number, result.state)
            training_seconds = time.perf_counter() - started
            updates = [result.update for result in trained.values()]
            bytes_down = len(participants) * (rounds.num_bytes(server.weights) + rounds.num_bytes(server.broadcast))
            after, _ = method.server_update(server, updates)
            progress = progress.after(after, {client: bool(result.state) for client, result in trained.items()})
            if device is not None and device.startswith("cuda"):
                torch.cuda.synchronize(device)  # so that the seconds are those of the work
            sizes = [update.num_samples for update in updates]
            yield Round(
                progress=progress,
                weights=method.reported_weights(after),
                participants=participants,
                num_samples=sum(sizes) * schedule.local_epochs,
                train_metrics=rounds.mean_metrics([result.metrics for result in trained.values()], sizes),
                bytes_down=bytes_down,
                bytes_up=sum(map(rounds.update_bytes, updates)),
                load_seconds=sum(result.load_seconds for result in results) / num_workers,
                train_seconds=training_seconds,
                aggregate_seconds=time.perf_counter() - started - training_seconds,
            )


def _state(states: ClientStates, progress: Progress, client: int) -> ClientState | None:
    """Return a client's state, None before its first round; PipelineError if it is lost."""
    number = progress.state_rounds.get(client, 0)
    state = states.load(client, number)
    if number and state is None:
        raise PipelineError(
            f"the state of client {client} after round {number} is missing or damaged. Run the command again: it "
            "resumes from the last checkpoint, or starts over if that is incomplete."
        )
    return state


@dataclass(frozen=True)
class _Trained:
    """What a client's update gave."""

    update: ClientUpdate
    state: ClientState
    metrics: Metrics
    load_seconds: float
