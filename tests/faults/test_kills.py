"""Every command, ended at a random moment: it goes on to the bytes that it would have left undisturbed."""

import contextlib
import os
import shutil
import signal
import time

import numpy as np
import pytest

from tests.faults import program
from tests.faults.conftest import SEED

SECONDS = ("timing.csv", "metrics.json", "details.json", "SHA256SUMS")  # these hold measured seconds, or their hashes
COMMANDS = {
    "prepare-data": (("prepare-data",), program.DATA),
    "prepare-backbone": (("prepare-backbone",), program.Path("data/backbones")),
    "extract-features": (program.EXTRACT, program.SET),
    "sweep-features": (program.SWEEP, program.Path("analysis/sweep")),
    "synthesize": (program.SYNTHESIZE, program.Path("data/datasets/digits-synthetic")),
    "train-fl": (program.TRAIN, program.RUN),
    "report": (("report",), program.Path("report")),
}
LONG = ("extract-features", "train-fl")  # work that takes hours: killed in `make test` as well
SOME_COMMANDS = [name if name in LONG else pytest.param(name, marks=pytest.mark.faults) for name in COMMANDS]


def begin(project, name):
    """The command and its output's folder, emptied, and without what it keeps for resuming."""
    arguments, output = COMMANDS[name]
    shutil.rmtree(project / output)
    shutil.rmtree(project / ".pipeline", ignore_errors=True)
    if name == "prepare-backbone":
        (project / "models").unlink()
    return arguments, project / output


def finished(project, name):
    return program.contents(project / COMMANDS[name][1], leave_out=SECONDS if name == "train-fl" else ())


def moments(name, number):
    return np.random.default_rng([SEED, number, *name.encode()])


@pytest.mark.parametrize("name", SOME_COMMANDS)
def test_kill_9(made, project, trial, name, number):
    undisturbed = made.commands[name]
    rng = moments(name, number)
    arguments, output = begin(project, name)
    with trial(f"kill -9 of {name}") as tried:
        if number % 2:
            command = program.start(project, *arguments)
            time.sleep(rng.random() * undisturbed.seconds)
            command.process.kill()
        else:
            at = int(rng.integers(1, undisturbed.operations + 1))
            command = program.start(project, *arguments, under=program.Conditions(dies_at=at))
        assert command.end() in (-signal.SIGKILL, 0)
        if command.process.exitcode and name != "prepare-backbone":
            assert not whole(output)
        program.succeed(project, *arguments)
        tried.compare(finished(made.root, name), finished(project, name))
        tried.compare(program.contents(made.root / "data"), program.contents(project / "data"))


def whole(output):
    """Whether the output says of itself that it is whole."""
    return (output / "manifest.json").exists() or (output / "SHA256SUMS").exists()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("name", LONG)
def test_asked_to_end(made, project, trial, name, kind, number):
    arguments, output = begin(project, name)
    with trial(f"{kind.name} to {name}") as tried:
        command = program.start(project, *arguments)
        while command.process.is_alive() and not (project / ".pipeline").exists():
            time.sleep(0.005)
        time.sleep(moments(name, number).random() * 0.7 * made.commands[name].seconds)
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(command.process.pid, kind)
        code = command.end()
        assert code in ({signal.SIGINT: 130, signal.SIGTERM: 143}[kind], 0), command.output
        if code:
            assert "the same command goes on from there" in command.output.splitlines()[-1]
            assert "Traceback" not in command.output
        program.succeed(project, *arguments)
        tried.compare(finished(made.root, name), finished(project, name))
