"""Full and read-only disks, and folders of another user: one line of error, nothing lost, and the next run resumes."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.faults import program
from tests.faults.conftest import SEED
from tests.faults.test_kills import COMMANDS, SOME_COMMANDS, begin, finished

MOUNTS = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting needs root")
NOBODY = 65534


@pytest.fixture
def project_on_disk(made, disk, tmp_path):
    """A copy of the project on the small file system; the commands' output goes elsewhere."""
    root = disk / "project"
    shutil.copytree(made.root, root, ignore=shutil.ignore_patterns("models"))
    (root / "models").symlink_to(made.root / "models")
    return root


def fill(disk: Path, leave: int) -> Path:
    """Fill the disk up to `leave` bytes."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    return filler


@MOUNTS
@pytest.mark.parametrize("name", SOME_COMMANDS)
def test_full_disk_loses_nothing_and_the_next_run_resumes(made, project_on_disk, disk, tmp_path, trial, name, number):
    project, log = project_on_disk, tmp_path / "log"
    arguments, output = begin(project, name)
    rng = np.random.default_rng([SEED, number, *name.encode()])
    with trial(f"full disk under {name}") as tried:
        need = used_by(project, arguments, disk, made, name)
        filler = fill(disk, leave=int(rng.integers(0, max(1, need // 4096))) * 4096 if number else 0)
        before = program.contents(project)
        code, said = program.run(project, *arguments, log=log)
        if code:
            line = program.error_line(said)
            assert "No space left on device" in line or "GB free" in line, line
            assert "ake room" in line and str(project) in line, line
        left = program.contents(project)
        assert {file: left.get(file) for file in before} == before
        assert not [file for file in left if file.endswith(".tmp")], left.keys()
        filler.unlink()
        program.succeed(project, *arguments, log=log)
        tried.compare(finished(made.root, name), finished(project, name))


def used_by(project, arguments, disk, made, name):
    """Return the size of the command's output in bytes."""
    folder = made.root / COMMANDS[name][1]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return size + (5_000_000 if name == "prepare-backbone" else 0)


@MOUNTS
@pytest.mark.parametrize("name", SOME_COMMANDS)
def test_read_only_disk_loses_nothing_and_the_next_run_resumes(made, project_on_disk, disk, tmp_path, trial, name):
    project, log = project_on_disk, tmp_path / "log"
    arguments, output = begin(project, name)
    with trial("read-only disk") as tried:
        before = program.contents(project)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        line = program.refuse(project, *arguments, says=["Read-only file system", "Mount the file"], log=log)
        assert str(project) in line
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        tried.compare(before, program.contents(project))
        program.succeed(project, *arguments, log=log)
        tried.compare(finished(made.root, name), finished(project, name))


@pytest.mark.skipif(os.geteuid() != 0, reason="taking another user's rights needs root")
@pytest.mark.parametrize("name", ["extract-features", "train-fl", "prepare-data"])
def test_folder_of_another_user_is_reported_and_unchanged(made, trial, name, tmp_path_factory):
    with trial("folder without access") as tried:
        place = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
        try:
            place.chmod(0o755)
            project = place / "project"
            shutil.copytree(made.root, project)
            arguments, output = begin_without_links(project, name)
            before = program.contents(project)
            log = place / "log"
            log.touch()
            log.chmod(0o666)
            under = program.Conditions(uid=NOBODY)
            line = program.refuse(project, *arguments, says=["Permission denied", "permissions"], log=log, under=under)
            assert str(project) in line
            tried.compare(before, program.contents(project))
            program.succeed(project, *arguments, log=log)
            tried.compare(finished(made.root, name), finished(project, name))
        finally:
            shutil.rmtree(place)


def begin_without_links(project, name):
    arguments, output = COMMANDS[name]
    shutil.rmtree(project / output)
    shutil.rmtree(project / ".pipeline")
    return arguments, output
