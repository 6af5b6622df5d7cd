"""Compare what `--dry-run` predicts for large data sets and federations with what the runs then take.

Each size is a project of its own: that many random images of 8 x 8 pixels in 1,000 classes, 100 images per client, 10
clients a round, tiny-sd as the frozen model, and one negative prompt per image. The dry runs of `extract-features` and
`train-fl` come first, while no feature exists. Up to --measure images, both then run, and are watched from outside:
seconds, bytes of the feature set, the most memory of any of their processes, and the most descriptors open in one.
Memory is watched until the result is printed: as a process ends, it touches 0.1 GB more of its libraries' files. The
ratio is measured over predicted. Beyond --measure, dry runs also plan for 8 processes, with one negative prompt and
with all prompts, and FedAvg runs, which needs no features. Linux only: other systems do not say what another process
needs.

    PYTHONPATH=. python benchmarks/plan.py                    # seven minutes, 1 GB of a disk
    PYTHONPATH=. python benchmarks/plan.py --images 10000 --images 20000 --measure 10000 --work /tmp/plan
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import scale_images

from pipeline import project, provenance
from pipeline.data import datasets
from pipeline.text import duration, size

ROOT = Path(__file__).parents[1]
CLASSES, IMAGE_SIZE, TEST_IMAGES, IMAGES_PER_CLIENT = 1_000, 8, 1_000, 100
PROCESSES = 8
SETTINGS = {
    "runtime.device": "cpu",
    "prepare_data.name": "noise",
    "prepare_data.image_size": IMAGE_SIZE,
    "extract_features.image_size": IMAGE_SIZE,
    "extract_features.negatives": 1,
    "train_fl.clients_per_round": 10,
}
PARTITION = "dir05"
STAGES = ("extract-features", "train-fl", "train-fl, fedavg")
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_BYTES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_WATCH_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """What a command printed, and what it took: seconds, and bytes and descriptors of the process that had most."""

    output: str
    seconds: float
    memory: int
    descriptors: int


@click.command()
@click.option("--images", "sizes", multiple=True, type=int, default=(10_000, 100_000, 1_000_000), help="Repeatable.")
@click.option("--measure", type=int, default=100_000, show_default=True, help="Run what has so many images at most.")
@click.option("--rounds", type=int, default=20, show_default=True, help="Rounds of the federated run.")
@click.option("--work", type=click.Path(path_type=Path), help="Where to write; a temporary folder by default.")
def main(sizes: tuple[int, ...], measure: int, rounds: int, work: Path | None) -> None:
    """Predict, measure, print the tables, then one JSON line."""
    if work:
        work.mkdir(parents=True, exist_ok=True)
    found: dict[int, Any] = {}
    for images in sizes:
        with tempfile.TemporaryDirectory(prefix="plan-", dir=work) as folder:
            found[images] = compared(Path(folder) / "project", images, rounds, images <= measure)
        _print_table(images, found[images])
    click.echo(json.dumps({"images": found, "rounds": rounds, "provenance": provenance.describe()}))


def compared(root: Path, images: int, rounds: int, is_measured: bool) -> dict[str, Any]:
    """Make a project of this size, predict both stages, and run them if `is_measured`, else FedAvg alone.

    Returns:
        Stage -> name -> {"predicted": number, "measured": number}, and the texts of the dry runs.

    Raises:
        click.ClickException: A command failed.
    """
    write_project(root, images)
    clients = max(10, images // IMAGES_PER_CLIENT)
    changes = SETTINGS | {"train_fl.num_clients": clients, "train_fl.num_rounds": rounds}
    settings = [f"--set={key}={value}" for key, value in changes.items()]
    several = ("--dry-run", f"--processes={PROCESSES}")
    _succeed(root, "prepare-backbone")
    extract = ("extract-features", *settings)
    train = ("train-fl", f"--partition={PARTITION}", "--seed=0", *settings, "--method=feddifrc")
    train_fedavg = (*train[:-1], "--method=fedavg")
    dry = {
        "extract-features": _succeed(root, *extract, "--dry-run").output,
        "train-fl": _succeed(root, *train, "--dry-run").output,
    }
    if not is_measured:
        every_prompt = (*extract, "--set=extract_features.negatives=all")
        dry["8 processes"] = _succeed(root, *extract, *several).output
        dry["8 processes, all prompts"] = _succeed(root, *every_prompt, *several).output
        dry["train-fl, fedavg"] = _succeed(root, *train_fedavg, "--dry-run").output
    predicted = {stage: predictions(dry[stage]) for stage in STAGES if stage in dry}
    measured: dict[str, dict[str, float]] = {stage: {} for stage in predicted}
    if is_measured:
        done = _succeed(root, *extract)
        features = Path(done.output.splitlines()[-1])
        passes = int(re.findall(r"(\d+) passes in", done.output)[0])
        measured["extract-features"] = _taken(done) | {"passes": passes, "disk": _bytes_in(features)}
    stage, words = ("train-fl", train) if is_measured else ("train-fl, fedavg", train_fedavg)
    done = _succeed(root, *words)
    details = json.loads((Path(done.output.splitlines()[-1]) / "details.json").read_text())
    measured[stage] = _taken(done) | {"sent": details["bytes_down"] + details["bytes_up"]}
    stages = {
        stage: {
            name: {"predicted": value} | ({"measured": measured[stage][name]} if name in measured[stage] else {})
            for name, value in predicted[stage].items()
        }
        for stage in predicted
    }
    return stages | {"dry runs": {name: text.splitlines() for name, text in dry.items()}}


def write_project(root: Path, images: int) -> None:
    """Make a project in `root` with a data set of so many random images, written block by block."""
    root.mkdir()
    project.create(root)
    splits = {
        "train": scale_images.Noise(images, IMAGE_SIZE, CLASSES),
        "test": scale_images.Noise(TEST_IMAGES, IMAGE_SIZE, CLASSES),
    }
    names = [f"class {label}" for label in range(CLASSES)]
    datasets.write(root / "data" / "datasets" / "noise", "noise", "noise", datasets.Source(names, splits, "none"))


def predictions(text: str) -> dict[str, float]:
    """Read the numbers of a dry run: seconds, bytes and counts, by the first word of their lines."""
    lines = {line[:14].strip(): line[14:] for line in text.splitlines()}
    found: dict[str, float] = {
        "time": _quantity(lines["time"], _SECONDS),
        "memory": _quantity(lines["memory"], _BYTES),
        "descriptors": int(re.findall(r"\d+", lines["descriptors"])[0]),
    }
    if "passes" in lines:
        in_all = re.search(r"(\d+) in all", lines["passes"])
        assert in_all
        found |= {"passes": int(in_all[1]), "disk": _quantity(lines["disk"], _BYTES)}
    if "sent" in lines:
        found |= {"steps": int(lines["steps"].split()[0])}
        found |= {"sent": _quantity(lines["sent"].rpartition("per round, ")[2], _BYTES)}
        if lines["guidance"] != "none":
            found |= {"guidance": _quantity(lines["guidance"], _BYTES)}
    return found


def watched(words: list[str], folder: Path) -> Run:
    """Run a command in a folder to its end, and watch it and the processes that it starts.

    Raises:
        click.ClickException: It failed; with what it printed.
    """
    started, printed, most, until_printed = time.perf_counter(), 0, (0, 0), (0, 0)
    with tempfile.TemporaryFile("w+") as output:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        running = subprocess.Popen(words, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=environment)
        while running.poll() is None:
            if (length := os.fstat(output.fileno()).st_size) > printed:
                printed, until_printed = length, most
            for process in _family(running.pid):
                try:
                    peak = re.search(r"VmHWM:\s*(\d+)", (process / "status").read_text())
                    opened = len(os.listdir(process / "fd"))
                except OSError:  # it has just ended
                    continue
                most = max(most[0], int(peak[1]) * 1024 if peak else 0), max(most[1], opened)
            time.sleep(_WATCH_SECONDS)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if running.returncode:
        raise click.ClickException(f"{' '.join(words)} failed.\n{text.strip()}")
    return Run(text.strip(), seconds, *(until_printed if any(until_printed) else most))


def _family(process: int) -> Iterator[Path]:
    """Yield the folders in /proc of a process and of all that it started."""
    folder = Path("/proc") / str(process)
    yield folder
    try:
        children = [int(child) for file in folder.glob("task/*/children") for child in file.read_text().split()]
    except OSError:  # it, or one of its threads, has just ended
        return
    for child in children:
        yield from _family(child)


def _succeed(root: Path, *words: str) -> Run:
    return watched([sys.executable, "-m", "pipeline", *words], root)


def _taken(done: Run) -> dict[str, float]:
    return {"time": done.seconds, "memory": done.memory, "descriptors": done.descriptors}


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _quantity(text: str, units: dict[str, float]) -> float:
    """Return the first number with one of these units."""
    number, unit = re.findall(rf"([\d.e+]+) ({'|'.join(units)})\b", text)[0]
    return float(number) * units[unit]


def _print_table(images: int, found: dict[str, Any]) -> None:
    click.echo(f"\n{images:,} images".ljust(40) + f"{'predicted':>12}{'measured':>12}{'ratio':>8}")
    for stage in (stage for stage in STAGES if stage in found):
        for name, pair in found[stage].items():
            values = [_said(name, value) for value in pair.values()]
            ratio = f"{pair['measured'] / pair['predicted']:.2f}" if "measured" in pair else ""
            click.echo(f"{stage:20}{name:19}" + "".join(f"{value:>12}" for value in values) + f"{ratio:>8}")
    for name, lines in found["dry runs"].items():
        for line in lines:
            if name.startswith("8") and line.startswith(("passes", "disk", "memory", "time")):
                click.echo(f"{name:26}{line}")


def _said(name: str, value: float) -> str:
    if name == "time":
        return duration(value)
    return size(value) if name in ("memory", "disk", "sent", "guidance") else f"{value:,.0f}"


if __name__ == "__main__":
    main()
