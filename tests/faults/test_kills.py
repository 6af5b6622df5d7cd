"""Every command, killed or interrupted at a random moment, resumes to the bytes of an undisturbed run."""

import contextlib
import functools
import os
import shutil
import signal
import time
from dataclasses import dataclass

import numpy as np
import pytest

from pipeline import provenance
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
LAST = {"prepare-backbone": "tiny-sd.json", "train-fl": provenance.CHECKSUMS, "report": "index.html"}
"""The file that is written last, where it is not manifest.json: the output is complete once it exists."""
FOLDERS = {
    "prepare-data": "prepare_data.seed=1",
    "extract-features": "extract_features.noise_seed=1",
    "synthesize": "synthesize.seed=1",
}
"""Commands whose output is one folder, replaced atomically, with a setting that changes its content."""
LONG = ("extract-features", "train-fl")  # work that takes hours: killed in `make test` as well
SOME_FOLDERS = ["prepare-data", *(pytest.param(name, marks=pytest.mark.faults) for name in list(FOLDERS)[1:])]
SOME_COMMANDS = [name if name in LONG else pytest.param(name, marks=pytest.mark.faults) for name in COMMANDS]


def begin(project, name):
    """Remove the command's output and its state for resuming; return its arguments and output folder."""
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


def killed(project, arguments, undisturbed, rng, number):
    """Run a command and kill it: after a random time if `number` is odd, else before one of its file operations."""
    if number % 2:
        command = program.start(project, *arguments)
        time.sleep(rng.random() * undisturbed.seconds)
        command.process.kill()
    else:
        at = int(rng.integers(1, undisturbed.operations + 1))
        command = program.start(project, *arguments, under=program.Conditions(dies_at=at))
    assert command.end() in (-signal.SIGKILL, 0), command.output


@pytest.mark.parametrize("name", SOME_COMMANDS)
def test_killed_command_resumes_with_identical_results(made, project, trial, name, number):
    arguments, output = begin(project, name)
    with trial(f"kill -9 of {name}") as tried:
        killed(project, arguments, made.commands[name], moments(name, number), number)
        check_complete_or_unfinished(tried, made, project, name)
        program.succeed(project, *arguments)
        tried.compare(finished(made.root, name), finished(project, name))
        tried.compare(program.contents(made.root / "data"), program.contents(project / "data"))


def check_complete_or_unfinished(tried, made, project, name):
    """Check a killed command's output: if it counts as complete, every file is there; otherwise no file is partial."""
    output, complete = project / COMMANDS[name][1], finished(made.root, name)
    left = {file: content for file, content in finished(project, name).items() if not file.endswith(".tmp")}
    if (output / LAST.get(name, "manifest.json")).exists():
        tried.compare(complete, left)
        if name == "train-fl":
            content = set(os.listdir(made.root / program.RUN)) - {provenance.CHECKSUMS}
            assert not provenance.changed_file(output, content)
        if name == "prepare-backbone":
            tried.compare(program.contents(made.root / "models"), program.contents(project / "models"))
    elif name in FOLDERS:
        assert not output.exists()
    elif name != "train-fl":  # whose tables grow round by round
        tried.compare({file: complete.get(file) for file in left}, left)


@dataclass(frozen=True)
class Replacement:
    """A command that replaces the output of a stage by another one, and the content of that."""

    arguments: tuple[str, ...]
    undisturbed: program.Undisturbed
    content: dict[str, bytes]


@pytest.fixture(scope="module")
def replacements(made, tmp_path_factory):
    """A function that returns the replacement for a stage, and caches it."""

    @functools.cache
    def make(name):
        root = tmp_path_factory.mktemp("replaced") / "project"
        shutil.copytree(made.root, root, ignore=shutil.ignore_patterns("models"))
        (root / "models").symlink_to(made.root / "models")
        asked = ["--overwrite"] if name == "extract-features" else []
        arguments = (*COMMANDS[name][0], "--set", FOLDERS[name], *asked)
        return Replacement(arguments, program.undisturbed(root, *arguments), finished(root, name))

    return make


@pytest.mark.parametrize("name", SOME_FOLDERS)
def test_command_killed_while_replacing_leaves_the_old_or_the_new_output(
    made, project, replacements, trial, name, number
):
    new, old = replacements(name), finished(made.root, name)
    assert new.content != old
    output = project / COMMANDS[name][1]
    with trial(f"kill -9 of {name} over another output") as tried:
        killed(project, new.arguments, new.undisturbed, moments(f"{name} again", number), number)
        present = output if output.exists() else output.with_name(f"{output.name}.old")
        left = program.contents(present)
        tried.compare(new.content if left == new.content else old, left)
        program.succeed(project, *new.arguments)
        tried.compare(new.content, finished(project, name))
        assert not list(output.parent.glob("*.tmp")) and not list(output.parent.glob("*.old"))


@pytest.mark.parametrize("name", FOLDERS)
def test_replaced_output_is_removed_by_the_next_run(project, name):
    """A command that was killed right after it published its output leaves the old one beside it."""
    output = project / COMMANDS[name][1]
    replaced = output.with_name(f"{output.name}.old")
    shutil.copytree(output, replaced)
    program.succeed(project, *COMMANDS[name][0])
    assert output.exists() and not replaced.exists()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("name", LONG)
def test_interrupted_command_resumes_with_identical_results(made, project, trial, name, kind, number):
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
            assert "run the command again to resume" in command.output.splitlines()[-1]
            assert "Traceback" not in command.output
        program.succeed(project, *arguments)
        tried.compare(finished(made.root, name), finished(project, name))
