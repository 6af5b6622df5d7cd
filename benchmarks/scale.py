"""Measure how time, memory and open files grow with the size of the data, and compare with bounds.

Each measurement runs at three sizes, each in a process of its own, which may have 256 files open. The table has the
seconds, the peak memory above that at the start, the most files open at once, and for each of the three the exponent of
its growth: the slope of its logarithm over that of the size, so 1 is linear and 0 constant. Where it says so, memory is
counted without the mapped pages of files, which the system takes back when memory is short. The exit code is 1 if an
exponent exceeds its bound. In all it takes some minutes and 2 GB of a temporary folder.

    make scale                                      # on an otherwise idle machine
    PYTHONPATH=. python benchmarks/scale.py --only verify --only diff

To add one, write a function that sets up what it measures in a folder and returns the action, and decorate it with
`@measure`; what needs much memory to set up is done by `prepare`, in another process.
"""

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import scale_clients
import scale_images
import states
import synthetic_set

from pipeline import memory, provenance
from pipeline.feature_store import FeatureSet, archive, comparison, listing, verification

Action = Callable[[], object]
SetUp = Callable[[Path, int], Action]
NOISE = {"seconds": 0.02, "megabytes": 16.0, "files": 16.0}  # smaller values count as these
WIDTHS = {"seconds": 10, "megabytes": 8, "files": 7}  # of the table's columns
TINY = (2, 4, 8)
PROMPTS, DIMS = 10, 512  # those of Stable Diffusion's features: 11 KB per row
ROWS_PER_SHARD, ALL_ROWS, BATCH = 4_000, 32_000, 64
MOST_FILES = 256


@dataclass(frozen=True)
class Measurement:
    """What to measure, at which sizes, and the largest exponents allowed."""

    set_up: SetUp
    prepare: Callable[[Path, int], None]
    unit: str
    sizes: tuple[int, int, int]
    bounds: dict[str, float]
    without_files: bool


MEASUREMENTS: dict[str, Measurement] = {}


def measure(
    name: str,
    unit: str,
    sizes: tuple[int, int, int],
    *,
    seconds: float,
    megabytes: float,
    files: float = 0.1,
    without_files: bool = False,
    prepare: Callable[[Path, int], None] = lambda folder, size: None,
) -> Callable[[SetUp], SetUp]:
    """Register a function as the measurement `name`; `seconds`, `megabytes` and `files` are its largest exponents.

    `without_files` counts no mapped pages of files as memory; it is sampled, where the system reports it.
    `prepare` and then the function are called with an empty folder and one of `sizes`, in `unit`s; the function returns
    the action to be measured. Both must also work at sizes 2, 4 and 8.
    """

    def register(set_up: SetUp) -> SetUp:
        bounds = {"seconds": seconds, "megabytes": megabytes, "files": files}
        MEASUREMENTS[name] = Measurement(set_up, prepare, unit, sizes, bounds, without_files)
        return set_up

    return register


def write_rows(folder: Path, rows: int, rows_per_shard: int = ROWS_PER_SHARD) -> None:
    """Write a set with this number of rows."""
    plan = synthetic_set.plan(rows, rows_per_shard, PROMPTS, DIMS)
    synthetic_set.write(folder, plan, (synthetic_set.features(plan, shard) for shard in range(plan.num_shards)))


def write_shards(folder: Path, shards: int) -> None:
    """Write a set with this number of shards, which are as small as shards can be."""
    plan = synthetic_set.plan(shards, 1, 2, 8)
    synthetic_set.write(folder, plan, (synthetic_set.features(plan, shard) for shard in range(shards)))


def write_archive(folder: Path, rows: int) -> None:
    """Write an exported set with this number of rows."""
    write_rows(folder, rows)
    archive.write(folder / "set", folder / "set.tar")
    for name in ("set", "staging"):
        shutil.rmtree(folder / name)


def write_divided(folder: Path, shards: int) -> None:
    """Write the same rows into this number of shards."""
    write_rows(folder, ALL_ROWS, ALL_ROWS // shards)


@measure("shards", "shards", (500, 1_500, 5_000), seconds=1.3, megabytes=1.1, prepare=write_shards)
def shards(folder: Path, size: int) -> Action:
    """Read, verify, compare, list, export and import a set of tiny shards."""

    def action() -> None:
        path, features = folder / "set", FeatureSet(folder / "set")
        order = np.random.default_rng(0).permutation(size)
        for start in range(0, size, BATCH):
            features.read(order[start : start + BATCH])
        verify(folder, size)()
        comparison.numbers(path, path)
        listing.finished(folder)
        archive.write(path, folder / "set.tar")
        archive.read(folder / "set.tar", folder, "copy")

    return action


@measure("verify", "rows", (8_000, 24_000, 72_000), seconds=1.25, megabytes=0.2, prepare=write_rows)
def verify(folder: Path, size: int) -> Action:
    """`pipeline features verify --full`."""

    def action() -> None:
        if wrong := verification.problems(folder / "set", full=True):
            raise click.ClickException(str(wrong[0]))

    return action


@measure("diff", "rows", (8_000, 24_000, 72_000), seconds=1.25, megabytes=0.2, prepare=write_rows)
def diff(folder: Path, size: int) -> Action:
    """`pipeline features diff`."""
    return lambda: comparison.numbers(folder / "set", folder / "set")


@measure("import", "rows", (8_000, 24_000, 72_000), seconds=1.25, megabytes=0.2, prepare=write_archive)
def import_(folder: Path, size: int) -> Action:
    """`pipeline features import`."""
    return lambda: archive.read(folder / "set.tar", folder)


@measure("random-rows", "shards", (10, 100, 1_000), seconds=0.3, megabytes=0.2, prepare=write_divided)
def random_rows(folder: Path, size: int) -> Action:
    """A thousand batches of 64 random rows out of 32,000, after every shard was read once."""
    features, rng = FeatureSet(folder / "set"), np.random.default_rng(0)
    batches = [rng.choice(ALL_ROWS, BATCH, replace=False) for _ in range(1_000)]
    for start in range(0, ALL_ROWS, BATCH):
        features.read(np.arange(start, start + BATCH))

    def action() -> None:
        for batch in batches:
            features.read(batch)

    return action


CLIENTS = (100, 1_000, 10_000)
measure("states", "clients", CLIENTS, seconds=0.2, megabytes=0.25)(states.set_up)
measure("partition", "clients", CLIENTS, seconds=0.9, megabytes=0.3)(scale_clients.partition)
measure("statistics", "clients", (1_000, 4_000, 16_000), seconds=2.1, megabytes=0.8)(scale_clients.statistics)
measure("pictures", "clients", CLIENTS, seconds=0.3, megabytes=0.9)(scale_clients.pictures)
measure("report", "clients", CLIENTS, seconds=0.7, megabytes=0.7)(scale_clients.report)
measure("replies", "clients", (32, 128, 512), seconds=1.2, megabytes=0.2, without_files=True)(scale_clients.replies)
measure("images", "images", (2_000, 6_000, 18_000), seconds=1.15, megabytes=0.3, prepare=scale_images.write_images)(
    scale_images.train_from_map
)


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(MEASUREMENTS)), help="Measure this alone; repeatable.")
@click.option("--tiny", is_flag=True, help="Run at sizes too small to measure anything; nothing is compared.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write; a temporary folder by default.")
@click.option("--child", type=(str, int), hidden=True, help="Measure this at this size in --folder, and print JSON.")
def main(only: tuple[str, ...], tiny: bool, folder: Path | None, child: tuple[str, int] | None) -> None:
    """Measure, print the table, then one JSON line."""
    if child:
        assert folder
        click.echo(json.dumps(_measure(MEASUREMENTS[child[0]], child[1], folder)))
        return
    names, found, high = only or tuple(MEASUREMENTS), {}, []
    click.echo(f"{'':12}{'size':>16}{'seconds':>10}{'MB':>8}{'files':>7}")
    for name in names:
        measurement = MEASUREMENTS[name]
        sizes = TINY if tiny else measurement.sizes
        rows = []
        for size in sizes:
            rows.append(row := _in_child(name, size, folder))
            said = f"{size:,} {measurement.unit}"
            click.echo(f"{name:12}{said:>16}{row['seconds']:>10.2f}{row['megabytes']:>8.0f}{row['files']:>7}")
        growth = {what: _exponent(sizes, [row[what] for row in rows], least) for what, least in NOISE.items()}
        for title, values in (("exponent", growth), ("bound", measurement.bounds)):
            click.echo(f"{name:12}{title:>16}" + "".join(f"{values[what]:>{n}.2f}" for what, n in WIDTHS.items()))
        found[name] = {"sizes": list(sizes), "measured": rows, "exponents": growth, "bounds": measurement.bounds}
        high += [f"{name}: {what}" for what, bound in measurement.bounds.items() if growth[what] > bound]
    click.echo(json.dumps({"measurements": found, "provenance": provenance.describe()}))
    if high and not tiny:
        raise click.ClickException(f"Grows faster than its bound: {', '.join(high)}.")


def _exponent(sizes: tuple[int, ...], values: list[float], least: float) -> float:
    """Return the slope of log(value) over log(size), by least squares; smaller values count as `least`."""
    slope = np.polyfit(np.log(sizes), np.log(np.maximum(values, least)), 1)[0]
    return round(float(slope), 3) + 0.0  # not -0.0


def _in_child(name: str, size: int, folder: Path | None) -> dict[str, Any]:
    """Run a measurement at one size in a process and a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="scale-", dir=folder) as root:
        command = [sys.executable, __file__, "--child", name, str(size), "--folder", root]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{name} failed at size {size:,}.\n{done.stderr.strip()}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _measure(measurement: Measurement, size: int, folder: Path) -> dict[str, float]:
    """Return the seconds, the peak of memory above the start in MB, and the most files open at once."""
    # A process of its own, because a peak of memory cannot be reset.
    preparing = multiprocessing.get_context("fork").Process(target=measurement.prepare, args=(folder, size))
    preparing.start()
    preparing.join()
    if preparing.exitcode:
        raise click.ClickException("It could not be prepared.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    action = measurement.set_up(folder, size)
    occupied = memory.anonymous if measurement.without_files else memory.peak
    before = occupied()
    if before is None:
        raise click.ClickException("This system does not report memory without files.")
    done, files, most = threading.Event(), [0], [before]

    def watch() -> None:
        while not done.wait(0.005):
            files.append(len(os.listdir("/dev/fd")))
            if measurement.without_files:
                most.append(occupied() or 0)  # the system keeps no peak of it

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        action()
    finally:
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    megabytes = (max(*most, occupied() or 0) - before) / 1e6
    return {"seconds": round(seconds, 3), "megabytes": round(megabytes, 1), "files": max(files)}


if __name__ == "__main__":
    main()
