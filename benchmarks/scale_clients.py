"""For scale.py: partitions, their pictures, the report, and Flower's server, as the number of clients grows."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import train_job
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from pipeline.federation import members
from pipeline.settings import config
from pipeline.settings.params import Federation
from stages.report import run as write_report
from stages.train_fl import methods, rounds, session
from stages.train_fl.engines.flower.messages import TrainReply
from stages.train_fl.engines.flower.strategy import FlowerEngine
from stages.train_fl.methods import ClientUpdate, Weights
from stages.train_fl.partitions import dirichlet, heterogeneity, picture

SAMPLES, CLASSES = 200_000, 200
MOST_PICTURE, MOST_PAGE = 300_000, 5_000_000  # bytes

Action = Callable[[], object]


def partition(folder: Path, clients: int) -> Action:
    """Draw a Dirichlet partition of 200,000 samples of 200 classes."""
    labels, rng = np.arange(SAMPLES) % CLASSES, np.random.default_rng(0)
    return lambda: dirichlet(labels, clients, 0.5, 0, rng)


def _counts(clients: int, classes: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 50, (clients, classes)) * (rng.random((clients, classes)) < 0.3) + np.eye(
        clients, classes, dtype=int
    )


def statistics(folder: Path, clients: int) -> Action:
    """Compute the statistics of a partition of ten classes; all pairs of clients are compared."""
    counts = _counts(clients, 10)
    return lambda: heterogeneity(counts)


def pictures(folder: Path, clients: int) -> Action:
    """Draw a partition of 1,000 classes."""
    counts, names = _counts(clients, 1_000), [f"class {label}" for label in range(1_000)]
    picture.write(folder / "first.svg", counts[:2], names)  # loads matplotlib

    def action() -> None:
        picture.write(folder / "partition.svg", counts, names)
        assert (folder / "partition.svg").stat().st_size < MOST_PICTURE

    return action


def report(folder: Path, clients: int) -> Action:
    """Write the report of two methods, one partition and one seed."""
    from tests.report import grid  # needs the repository's folder on the path

    def write(root: Path, names: list[str], number: int) -> None:
        root.mkdir(exist_ok=True)
        written = grid.write_grid(root, names, ["dir005"], [0], 2, number)
        write_report(config.load(written / "params.yaml"))

    write(folder / "first", ["fedavg"], 10)  # loads the libraries

    def action() -> None:
        write(folder, ["fedavg", "fedprox"], clients)
        assert (folder / "report" / "index.html").stat().st_size < MOST_PAGE

    return action


def replies(folder: Path, clients: int) -> Action:
    """Aggregate a round of SCAFFOLD on Flower's server: every client sends the small CNN and as much again, 1.4 MB."""
    torch.set_num_threads(1)
    job = train_job.Job("small_cnn", clients, clients, 1, 1, 1, 1, 0.01, 0.0)
    model = job.model()
    method = methods.build(methods.Scaffold.Settings(), model, job.momentum, 0.0, clients)
    schedule = rounds.Schedule(1, clients, 1, 1, job.learning_rate, 1.0, "none", seed=0)
    params = Federation(
        min_clients=clients,
        join_timeout=600.0,
        round_timeout=600.0,
        evaluation_clients="all",
        differential_privacy=None,
    )
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as in a process of Flower
    grid = _Nodes(clients, session.weights_of(model), method.init_server(session.weights_of(model)).broadcast)
    joined = members.Members(grid, clients, params)
    joined.wait(for_all=True)
    config = SimpleNamespace(params=SimpleNamespace(federation=params), state_dir=folder)
    run: Any = SimpleNamespace(config=config, schedule=schedule, path=folder)
    engine = FlowerEngine(run, method, joined, grid, "0" * 16)
    start = engine.begin(session.weights_of(model))

    def action() -> None:
        (done,) = engine.rounds(start, None)
        assert len(done.participants) == clients

    return action


class _Nodes(Grid):
    """Nodes that answer at once, with updates that are made when the server pulls them."""

    def __init__(self, number: int, weights: Weights, extras: Weights) -> None:
        """Let this number of nodes send these tensors."""
        self._number, self._tensors = number, (weights, extras)
        self._asked: dict[str, Message] = {}
        self._ids = itertools.count(1)

    def get_node_ids(self) -> list[int]:
        """Return Flower's ids of all nodes."""
        return list(range(1, self._number + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages until they are answered."""
        added = {str(next(self._ids)): message for message in messages}
        for number, message in added.items():
            message.metadata.__dict__["_message_id"] = number
        self._asked |= added
        return list(added)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answer messages."""
        return [self._answer(self._asked.pop(number)) for number in message_ids if number in self._asked]

    def _answer(self, message: Message) -> Message:
        client = message.metadata.dst_node_id - 1
        if message.metadata.message_type == members.JOIN:
            return Message(members.introduction(client, f"n{client}", 1, {}), reply_to=message)
        weights, extras = ({name: value + client for name, value in part.items()} for part in self._tensors)
        return Message(TrainReply(ClientUpdate(weights, 1, 1, extras), {}, True, 0.0, 0.0).content(), reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return the replies."""
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None:
        """Do nothing."""

    @property
    def run(self) -> Any:
        """None."""

    def create_message(self, content: RecordDict, *details: Any, **more: Any) -> Message:
        """Do nothing that the server needs."""
        raise NotImplementedError
