"""Rounds of a federated run, shared by all engines: the schedule, the state between rounds, and client sampling.

Between rounds a run is a `Progress`, and every random draw is keyed by (seed, round, client). A run can therefore stop
after any round and resume from its Progress with identical results.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from pipeline import seeding
from pipeline.errors import TrainingDiverged
from pipeline.settings.params import TrainFL
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

    @staticmethod
    def of(params: TrainFL, seed: int) -> "Schedule":
        """Return the schedule of the settings `train_fl`."""
        keys = {own.name for own in fields(Schedule)} - {"seed"}
        return Schedule(**params.model_dump(include=keys), seed=seed)

    def learning_rate_of(self, number: int) -> float:
        """Return the learning rate of round `number`, counted from 1: it decays once after every round."""
        return self.learning_rate * self.learning_rate_decay ** (number - 1)


@dataclass(frozen=True)
class Progress:
    """The state of a run between two rounds.

    The states of the clients are kept elsewhere (`client_states`): `state_rounds` has, for each client with a state,
    the last round whose update of it was aggregated, and with it the state that the client continues from.
    """

    number: int  # rounds done
    server: ServerState
    state_rounds: dict[int, int] = field(default_factory=dict)  # client -> round

    def after(self, server: ServerState, kept: Mapping[int, bool]) -> "Progress":
        """Return the state after the next round: `kept` has for each participant whether it keeps a state."""
        others = {client: number for client, number in self.state_rounds.items() if client not in kept}
        number = self.number + 1
        return Progress(number, server, others | {client: number for client, keeps in kept.items() if keeps})


@dataclass(frozen=True)
class Round:
    """The outcome of one round."""

    progress: Progress  # the state after it
    weights: Weights  # the global model to report
    participants: list[int]  # client ids, ascending
    num_samples: int  # that the participants trained on, counted once per epoch
    train_metrics: Metrics  # mean losses over participants, weighted by their samples
    bytes_down: int  # sent to the participants
    bytes_up: int  # that the participants sent back
    load_seconds: float  # the part of `train_seconds` that gathering batches took
    train_seconds: float  # of local training
    aggregate_seconds: float  # of the server's update

    @property
    def number(self) -> int:
        """The round, counted from 1."""
        return self.progress.number


def begin(method: Method, weights: Weights) -> Progress:
    """Return the state before the first round."""
    return Progress(0, method.init_server(weights))


def client_batches(data: ClientData, schedule: Schedule, number: int, client: int, device: str | None) -> Batches:
    """Return the batches of one client in one round, the same under every engine."""
    generator = seeding.torch_generator(schedule.seed, "batches", number, client)
    return Batches(data, schedule.local_epochs, schedule.batch_size, schedule.augmentation, generator, device)


def update_client(
    method: Method,
    weights: Weights,
    broadcast: Weights,
    state: ClientState | None,  # None before the client's first round
    batches: Batches,
    schedule: Schedule,
    number: int,
    client: int,
    seeded: bool = True,
) -> tuple[ClientUpdate, ClientState, Metrics]:
    """Run a client's update in round `number`, the same under every engine.

    Tensors from a file or a message get the layout that those of an undisturbed run have. Torch's global generator is
    seeded, if `seeded`: the package's own methods do not draw from it; a method defined elsewhere may.
    """
    weights, broadcast, kept = map(method.local_sgd.laid_out, (weights, broadcast, state or {}))
    learning_rate = schedule.learning_rate_of(number)
    seed = seeding.scoped_global_torch_seed(schedule.seed, "client", number, client)
    with seed if seeded else contextlib.nullcontext():
        if state is None:
            kept = method.init_client(weights)
        return method.client_update(weights, broadcast, kept, batches, learning_rate)


def sample_clients(with_data: list[int], schedule: Schedule, number: int) -> list[int]:
    """Draw the participants of round `number` uniformly from the clients that have data; all ids are ascending."""
    rng = seeding.numpy_generator(schedule.seed, "client sampling", number)
    return sorted(int(client) for client in rng.permutation(with_data)[: schedule.clients_per_round])


def mean_metrics(metrics: list[Metrics], sizes: list[int]) -> Metrics:
    """Return the mean of each of the participants' metrics, weighted by their samples."""
    return {name: float(np.average([own[name] for own in metrics], weights=sizes)) for name in metrics[0]}


def check_finite(metrics: Metrics, client: int, number: int) -> None:
    """Raise TrainingDiverged if a loss of a client is not a finite number."""
    if not all(np.isfinite(value) for value in metrics.values()):
        raise TrainingDiverged(
            f"training diverged (the loss of client {client} in round {number} is {metrics}). "
            "Lower train_fl.learning_rate."
        )


def num_bytes(tensors: Weights) -> int:
    """Return the bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())


def update_bytes(update: ClientUpdate) -> int:
    """Return the bytes of all tensors that a client sends: its weights, and those that its method adds."""
    parts = [getattr(update, own.name) for own in fields(update)]
    return sum(num_bytes(part) for part in parts if isinstance(part, dict))
