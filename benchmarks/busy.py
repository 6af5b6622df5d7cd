"""Time every stage on an idle machine, and beside other programs that use its cores.

Each stage of a small project (digits, tiny-sd) runs as a `python -m pipeline` command: alone, then beside one busy
loop, then beside three. A busy loop is a Python process that computes without end. The stages run in the pipeline's
order, in one project per load, so that the times to compare are measured one right after the other. The table has the
median seconds and the median of their ratios to idle, over the repeats. The exit code is 1 if a ratio exceeds its
bound.

`fair` is the ratio of a program that loses nothing but the cores that others use. The system shares N cores equally
between T threads of a stage and B busy loops, so that the stage has N T / (T + B) cores, if T + B is at least N. With
T = N threads it had N cores before, and the ratio is (N + B) / N: 1.5 beside one loop and 2.5 beside three, on two
cores. A part of a stage on one thread is slowed down less, by 1 and 2. A stage slower than that also loses time in
which its threads wait for each other.

    python benchmarks/busy.py                             # on an otherwise idle machine
    GOMP_SPINCOUNT=300000 python benchmarks/busy.py       # with threads that spin while they wait, OpenMP's default
"""

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pipeline import provenance
from pipeline.sigterm import Terminated, on_sigterm

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "prepare_data.train_subset": 400,
    "extract_features.basis_images": 100,
    "sweep_features.timesteps": "[100]",
    "sweep_features.images": 300,
    "sweep_features.basis_images": 100,
    "sweep_features.margin_images": 50,
    "synthesize.images_per_class": 2,
    "train_fl.num_rounds": 10,
    "sweep.methods": "[feddifrc]",
    "sweep.partitions": "[dir05]",
    "sweep.seeds": "[0]",
}
STAGES = {
    "prepare-data": ["--name", "large", "--image-size", "512"],  # the other stages' data set takes no time
    "prepare-backbone": [],
    "extract-features": [],
    "analyze-features": [],
    "sweep-features": [],
    "synthesize": [],
    "train-fl": ["--method", "feddifrc", "--partition", "dir05", "--seed", "0"],
    "report": [],
}
LOADS = [(1, 1.8), (3, 3.2)]  # on two cores
# A loop also ends after its parent, in case that is killed.
LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(1_000_000): pass"


@click.command()
@click.option("--repeats", default=2, show_default=True, help="Measurements of each kind.")
@click.option(
    "--load", "loads", type=(int, float), multiple=True, default=LOADS, show_default=True,
    help="Number of busy loops, and the largest ratio to idle allowed beside them; repeatable.",
)  # fmt: skip
def main(repeats: int, loads: list[tuple[int, float]]) -> None:
    """Measure and print."""
    cores = provenance.describe()["hardware"]["cores"]
    seconds: dict[str, dict[int, list[float]]] = {stage: {loops: [] for loops in (0, *dict(loads))} for stage in STAGES}
    with on_sigterm(_terminate), tempfile.TemporaryDirectory(prefix="busy-") as folder:
        for repeat in range(repeats):
            projects = {loops: _project(Path(folder) / f"{repeat}-{loops}") for loops in (0, *dict(loads))}
            for stage, arguments in STAGES.items():
                for loops, project in projects.items():
                    with _busy(loops):
                        seconds[stage][loops].append(_run(project, stage, *arguments))
                latest = ", ".join(f"{times[-1]:.1f} s" for times in seconds[stage].values())
                click.echo(f"{stage}: {latest}", err=True)
    fair = {loops: max(1.0, (cores + loops) / cores) for loops, _ in loads}
    rows = {stage: _row(times) for stage, times in seconds.items()}
    click.echo(f"{'stage':18}{'idle':>9}" + "".join(f"{f'{loops} busy':>11}{'ratio':>8}" for loops, _ in loads))
    for stage, row in rows.items():
        ratios = "".join(f"{row['seconds'][loops]:>9.1f} s{row['ratios'][loops]:>8.2f}" for loops, _ in loads)
        click.echo(f"{stage:18}{row['seconds'][0]:>7.1f} s{ratios}")
    click.echo(f"{'fair':18}{'':9}" + "".join(f"{'':11}{fair[loops]:>8.2f}" for loops, _ in loads))
    click.echo(f"{'bound':18}{'':9}" + "".join(f"{'':11}{bound:>8.2f}" for _, bound in loads))
    result: dict[str, Any] = {"stages": rows, "fair": fair, "bounds": dict(loads), "repeats": repeats}
    click.echo(json.dumps(result | {"provenance": provenance.describe()}))
    slow = [stage for stage, row in rows.items() if any(row["ratios"][loops] > bound for loops, bound in loads)]
    if slow:
        raise click.ClickException(f"Slower than the bound: {', '.join(slow)}.")


def _row(times: dict[int, list[float]]) -> dict[str, dict[int, float]]:
    """Return the median seconds by number of loops, and the median ratios to idle."""
    idle = times[0]
    return {
        "seconds": {loops: statistics.median(values) for loops, values in times.items()},
        "ratios": {
            loops: statistics.median(value / alone for value, alone in zip(values, idle, strict=True))
            for loops, values in times.items()
            if loops
        },
    }


def _project(folder: Path) -> Path:
    """Make a project with the data set of all stages but the first."""
    folder.mkdir()
    shutil.copy(ROOT / "params.yaml", folder)
    _run(folder, "prepare-data")
    return folder


def _run(project: Path, stage: str, *arguments: str) -> float:
    """Run a stage and return its seconds, the program's start included."""
    sets = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "pipeline", "--quiet", stage, *arguments, *sets]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise click.ClickException(f"{stage} failed.\n{done.stderr.strip()}")
    return seconds


@contextlib.contextmanager
def _busy(loops: int) -> Iterator[None]:
    """Keep this many processes busy."""
    with contextlib.ExitStack() as stack:
        for _ in range(loops):
            loop = stack.enter_context(subprocess.Popen([sys.executable, "-c", LOOP]))
            stack.callback(loop.kill)
        yield


def _terminate() -> None:
    raise Terminated


if __name__ == "__main__":
    main()
