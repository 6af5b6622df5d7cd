"""A small project in which every stage has run, copies of it to damage, and the table of faults tried."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from tests.conftest import made_once
from tests.faults import program

SEED = int(os.environ.get("FAULTS_SEED", "0"))
"""Seed of every random moment; set FAULTS_SEED to try others."""


@dataclass
class Trial:
    """A fault that is tried."""

    lost: int = 0

    def compare(self, expected: dict[str, bytes], found: dict[str, bytes]) -> None:
        """Check that exactly the expected files exist, with the same bytes."""
        wrong = [name for name, content in expected.items() if found.get(name) != content]
        self.lost += len(wrong)
        assert not wrong and set(found) == set(expected), (wrong, set(found) ^ set(expected))


@dataclass
class Ledger:
    """Kind of fault -> [tried, survived, files lost]."""

    rows: dict[str, list[int]] = field(default_factory=dict)

    @contextlib.contextmanager
    def trial(self, kind: str) -> Iterator[Trial]:
        """Count one fault, as survived if the block raises nothing."""
        row, trial = self.rows.setdefault(kind, [0, 0, 0]), Trial()
        row[0] += 1
        try:
            yield trial
            row[1] += 1
        finally:
            row[2] += trial.lost


_LEDGER = Ledger()


def pytest_report_header() -> str:
    return f"faults: random moments by FAULTS_SEED={SEED}"


def pytest_terminal_summary(terminalreporter, config) -> None:
    if not _LEDGER.rows or config.option.markexpr:
        return
    rows = [(kind, *counts) for kind, counts in _LEDGER.rows.items()]
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    terminalreporter.write_line(f"\n| {'fault':58} | tried | survived | files lost |\n|{'-' * 60}|---|---|---|")
    for kind, tried, survived, lost in rows:
        terminalreporter.write_line(f"| {kind:58} | {tried:5} | {survived:8} | {lost:10} |")


@pytest.fixture
def trial():
    """`with trial("kind of fault") as tried:` adds a fault to the table."""
    return _LEDGER.trial


@dataclass(frozen=True)
class Made:
    """The project, and the measurements of its commands."""

    root: Path
    commands: dict[str, program.Undisturbed]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Made:
    """A project in which every stage has run; shared by all tests, so never change it."""
    folder = made_once(tmp_path_factory, "made", _run_every_stage)
    commands = json.loads((folder / "commands.json").read_text())
    return Made(folder / "project", {name: program.Undisturbed(**measured) for name, measured in commands.items()})


def _run_every_stage(folder: Path) -> None:
    """Make the project, and commands.json with the measurements."""
    root = folder / "project"
    root.mkdir()
    program.write_settings(root)
    program.succeed(root, "--version")  # starts the fork server
    commands = {}
    for arguments in (("prepare-data",), ("prepare-backbone",), program.EXTRACT, program.SWEEP, program.SYNTHESIZE,
                      program.TRAIN, ("report",)):  # fmt: skip
        commands[arguments[0]] = asdict(program.undisturbed(root, *arguments))
    (folder / "commands.json").write_text(json.dumps(commands))


@pytest.fixture
def project(made, tmp_path) -> Path:
    """A copy of the project to damage; the model is a link to the shared one."""
    root = tmp_path / "project"
    shutil.copytree(made.root, root, ignore=shutil.ignore_patterns("models"))
    (root / "models").symlink_to(made.root / "models")
    return root


def pytest_generate_tests(metafunc) -> None:
    """Parametrize `number`, which counts random moments: 20 in `make test-faults`; else two, or one for full disks."""
    if "number" in metafunc.fixturenames:
        always = 1 if metafunc.module.__name__.endswith("test_disks") else 2
        long = [pytest.param(number, marks=pytest.mark.faults) for number in range(always, 20)]
        metafunc.parametrize("number", [*range(always), *long])
