"""Run the program in separate processes that can be killed and denied resources.

Every command runs `pipeline`'s own entry point in a real process. The processes are forked from one that has imported
the libraries already (tests/integration/forked.py), so that a start takes milliseconds instead of seconds.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import write_params
from tests.integration.forked import Process

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GIT_DIR": os.devnull}
"""The environment of every command. No commit is found, so bytes are equal whatever is committed meanwhile."""
TIMEOUT = 120  # seconds after which a command counts as hanging

SETTINGS: dict[str, Any] = {
    "prepare_data.image_size": 8,
    "prepare_data.train_subset": 24,
    "extract_features.image_size": 32,
    "extract_features.negatives": 1,
    "extract_features.basis_images": 8,
    "extract_features.rows_per_shard": 4,
    "analyze_features.splits": 1,
    "sweep_features.timesteps": [100, 300, 500],
    "sweep_features.margin_images": 2,
    "sweep_features.picture_images": 1,
    "synthesize.num_inference_steps": 2,
    "train_fl.num_rounds": 4,
    "sweep.partitions": ["iid"],
    "sweep.methods": ["feddifrc"],
    "runtime.checkpoint_every": 1,
    "runtime.workers": 2,
    "runtime.unet_batch_size": 16,  # twelve passes per shard; 64 would be computed
}
EXTRACT = ("extract-features",)
TRAIN = ("train-fl", "--method", "feddifrc", "--partition", "iid", "--seed", "0")
SWEEP = ("sweep-features",)
SYNTHESIZE = ("synthesize", "--images-per-class", "1")
SET = Path("data/features/digits-tiny-sd-t300")
DATA = Path("data/datasets/digits")
RUN = Path("results/feddifrc-iid/s0")


@dataclass
class Command:
    """A running command."""

    process: Process
    log: Path

    @property
    def output(self) -> str:
        """Its standard output and error so far."""
        return self.log.read_text(encoding="utf-8", errors="surrogateescape")

    def end(self) -> int:
        """Wait for its end and return its exit code, negative for a signal."""
        code = self.process.end(TIMEOUT)
        if code is None:
            self.process.kill()
            raise AssertionError(f"hangs: {self.output}")
        return code


@dataclass(frozen=True)
class Conditions:
    """Conditions of a command: its user, its environment, and the file operation at which it is killed."""

    uid: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    dies_at: int | None = None
    counts_in: Path | None = None


@dataclass(frozen=True)
class Undisturbed:
    """Seconds and file operations of an undisturbed command."""

    seconds: float
    operations: int


def start(root: Path, *arguments: str, log: Path | None = None, under: Conditions = Conditions()) -> Command:
    """Start a command in the project at `root`; its output goes to a file outside it."""
    log = log or root.parent / f"{root.name}.log"
    how = (arguments, under.uid, under.dies_at, under.counts_in and str(under.counts_in))
    environment = {**os.environ, **ENVIRONMENT, **under.environment}
    return Command(Process(f"{__name__}:run_here", how, root, environment, log), log)


def run(root: Path, *arguments: str, **how: Any) -> tuple[int, str]:
    """Run a command to its end; return its exit code and output."""
    command = start(root, *arguments, **how)
    return command.end(), command.output


def succeed(root: Path, *arguments: str, **how: Any) -> str:
    """Run a command that must succeed; return its output."""
    code, output = run(root, *arguments, **how)
    assert code == 0, output
    return output


def undisturbed(root: Path, *arguments: str) -> Undisturbed:
    """Run a command that must succeed; return its measurements."""
    counted = root.parent / "count"
    started = time.perf_counter()
    succeed(root, *arguments, under=Conditions(counts_in=counted))
    return Undisturbed(time.perf_counter() - started, int(counted.read_text()))


def refuse(root: Path, *arguments: str, says: Iterable[str], **how: Any) -> str:
    """Run a command that must end in one line of error with each of the texts `says`; return the line."""
    code, output = run(root, *arguments, **how)
    assert code == 1, (code, output)
    line = error_line(output)
    for words in says:
        assert words in line, line
    return line


def error_line(output: str) -> str:
    """Return the one line of error that an output must end in, without a traceback or HDF5's own messages."""
    assert "Traceback" not in output and "HDF5-DIAG" not in output, output
    lines = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and output.splitlines()[-1] == lines[0], output
    return lines[0]


def contents(folder: Path, pattern: str = "*", leave_out: Iterable[str] = ()) -> dict[str, bytes]:
    """Return the bytes of all files below a folder, by path."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob(pattern))
        if file.is_file() and file.name not in leave_out
    }


def unfinish_run(root: Path) -> None:
    """Take the mark of a finished run from the run of TRAIN, which would keep it and read nothing."""
    (root / RUN / "SHA256SUMS").unlink()


def write_settings(root: Path, **changes: Any) -> None:
    """Write params.yaml of the small project."""
    write_params(root, {**SETTINGS, **{key.replace("__", "."): value for key, value in changes.items()}})


def run_here(arguments: list[str], uid: int | None, dies_at: int | None, counts_in: str | None) -> None:
    """Run a command in this process, under the Conditions of these names."""
    if uid is not None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    from pipeline.cli.commands import main

    if dies_at is None and counts_in is None:
        main(arguments, prog_name="pipeline")
    operations = _Operations(dies_at)
    try:
        main(arguments, prog_name="pipeline")
    finally:
        if counts_in:
            Path(counts_in).write_text(str(operations.count))


class _Operations:
    """Counts the operations that change files, and kills the process (kill -9) before the given one."""

    def __init__(self, dies_at: int | None) -> None:
        self.count = 0
        self._dies_at = dies_at
        sys.addaudithook(self._see)

    def _see(self, event: str, details: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir"):
            self.count += 1
            if self.count == self._dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
