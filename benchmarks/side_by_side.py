"""Time several `pipeline train-fl` on one machine: in sequence or in parallel, with all threads or one thread each.

    python benchmarks/side_by_side.py            # in a project with extracted features, as after `make repro`

The threads of an operation wait for one another by spinning. If processes have more threads than there are cores, the
thread that the others wait for may not be scheduled, and all of them waste time.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from pipeline import provenance


@click.command()
@click.option("--jobs", type=click.IntRange(min=2), default=2, show_default=True, help="Runs.")
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True, help="Rounds of each run.")
@click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True, help="The fastest one counts.")
def main(jobs: int, rounds: int, repeats: int) -> None:
    """Time FedDifRC on dir05 with the settings of params.yaml, one seed per job."""
    cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        shutil.copy("params.yaml", project)
        (project / "data").symlink_to(Path("data").resolve())
        cases = {
            f"one after the other, {cores} threads": (1, cores),
            f"side by side, {cores} threads each": (jobs, cores),
            "side by side, 1 thread each": (jobs, 1),
        }
        seconds = {
            case: min(_seconds(project, jobs, rounds, *how) for _ in range(repeats)) for case, how in cases.items()
        }
    first = next(iter(seconds.values()))
    for case, of_case in seconds.items():
        click.echo(f"{jobs} runs, {case:34} {of_case:6.1f} s   {of_case / first:.2f}")
    result = {"seconds": seconds, "jobs": jobs, "rounds": rounds}
    click.echo(json.dumps(result | {"provenance": provenance.describe("cpu")}))


def _seconds(project: Path, jobs: int, rounds: int, at_a_time: int, threads: int) -> float:
    started = time.perf_counter()
    for first in range(0, jobs, at_a_time):
        running = [_start(project, seed, rounds, threads) for seed in range(first, first + at_a_time)]
        if any([process.wait() for process in running]):
            raise click.ClickException("A run failed. Run `pipeline train-fl --method feddifrc --partition dir05`.")
    return time.perf_counter() - started


def _start(project: Path, seed: int, rounds: int, threads: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "pipeline", "--params", str(project / "params.yaml"), "--quiet", "train-fl"]
    command += ["--method", "feddifrc", "--partition", "dir05", "--seed", str(seed), "--overwrite"]
    command += ["--num-rounds", str(rounds), "--set", f"runtime.num_threads={threads}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
