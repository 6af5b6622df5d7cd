"""Measure checkpoints of a method with client state (SCAFFOLD), as the number of all clients grows.

Ten clients of one image train per round, 40 rounds in all, with a checkpoint every ten; the run is stopped after half
of them and resumed. Each number of clients has a process of its own. The table has the median seconds, processor
seconds and megabytes written per checkpoint, the seconds of resuming, and the peak of memory above that at the start.

    python benchmarks/states.py                   # 100, 1,000 and 10,000 clients, one minute
    python benchmarks/states.py --clients 50

scale.py has bounds for its growth.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import train_job

from pipeline import memory, provenance
from stages.train_fl import methods, rounds, session
from stages.train_fl.checkpoint import Checkpoint
from stages.train_fl.client_data import ClientData
from stages.train_fl.client_states import ClientStates
from stages.train_fl.engines import local

ROUNDS, EVERY, PARTICIPANTS = 40, 10, 10
COLUMNS = {"save_seconds": "seconds", "save_cpu_seconds": "CPU s", "save_megabytes": "MB", "load_seconds": "resume s"}


@click.command()
@click.option("--clients", multiple=True, type=int, default=(100, 1_000, 10_000), help="Number of clients; repeatable.")
def main(clients: tuple[int, ...]) -> None:
    """Measure, print the table, then one JSON line."""
    click.echo(f"{'clients':>8}" + "".join(f"{title:>10}" for title in [*COLUMNS.values(), "peak MB"]))
    found = {}
    for size in clients:
        # A process of its own, because a peak of memory cannot be reset.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[size] = row = pool.apply(_measured, (size,))
        click.echo(f"{size:>8,}" + "".join(f"{row[name]:>10.2f}" for name in [*COLUMNS, "peak_megabytes"]))
    click.echo(json.dumps({"clients": found, "provenance": provenance.describe()}))


def set_up(folder: Path, size: int) -> Callable[[], dict[str, float]]:
    """Return a run with `size` clients that keeps its checkpoints in `folder`, and returns what they cost."""
    torch.set_num_threads(1)
    job = train_job.Job("small_cnn", size, min(size, PARTICIPANTS), 1, ROUNDS, 1, 1, 0.01, 0.0)
    model, clients = job.model(), [ClientData(*job.client(0))] * size
    method = methods.build(methods.Scaffold.Settings(), model, job.momentum, 0.0, size)
    schedule = rounds.Schedule(ROUNDS, job.clients_per_round, 1, 1, job.learning_rate, 1.0, "none", seed=0)

    def action() -> dict[str, float]:
        saves: list[tuple[float, ...]] = []
        for last in (ROUNDS // 2, ROUNDS):
            checkpoint = Checkpoint(folder, ClientStates(folder / "states"))
            started = time.perf_counter()
            loaded = checkpoint.load("cpu")
            load_seconds = time.perf_counter() - started
            start = loaded[0] if loaded else rounds.begin(method, session.weights_of(model))
            for done in local.run(method, start, clients, schedule, states=checkpoint.states):
                if done.number % EVERY == 0:
                    saves.append(_save(checkpoint, done.progress, folder))
                if done.number == last:
                    break
        numbers = [statistics.median(values) for values in zip(*saves, strict=True)]
        return dict(zip(COLUMNS, [*numbers, load_seconds], strict=True))

    return action


def _save(checkpoint: Checkpoint, progress: rounds.Progress, folder: Path) -> tuple[float, float, float]:
    """Save a checkpoint; return its seconds, processor seconds, and the megabytes of the files that it wrote."""
    before, started = _files(folder), (time.perf_counter(), time.process_time())
    checkpoint.save(progress, {})
    seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    return seconds, cpu_seconds, sum(size for inode, size in _files(folder).items() if inode not in before) / 1e6


def _files(folder: Path) -> dict[int, int]:
    """Return inode -> bytes of all files in a folder; files are replaced, never changed."""
    found = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return {status.st_ino: status.st_size for status in found}


def _measured(size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="states-") as folder:
        action = set_up(Path(folder), size)
        before = memory.peak()
        return action() | {"peak_megabytes": round((memory.peak() - before) / 1e6, 1)}


if __name__ == "__main__":
    main()
