"""A killed sweep goes on from its finished timesteps, to the bytes of one that was not; nothing stale is taken."""

import json
import shutil
import time

import numpy as np
import pytest

from pipeline import locks
from stages.analyze_features.judge import Scores
from stages.analyze_features.kept import Kept, Swept
from stages.analyze_features.recommend import Candidate
from tests.faults import program

SWEEP = ("sweep-features", "--timesteps", "[100, 200, 300, 400]")


def project(root, made=None):
    """A small project at `root`, on the data and the model of another one."""
    root.mkdir()
    program.write_settings(root)
    for folder in ("data", "models") if made else ():
        (root / folder).symlink_to(made / folder)
    return root


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A project on a few digits, swept."""
    root = project(tmp_path_factory.mktemp("swept") / "project")
    for command in (("prepare-data",), ("prepare-backbone",), SWEEP):
        program.succeed(root, *command)
    return root


@pytest.fixture(scope="module")
def killed_once(undisturbed, tmp_path_factory):
    """Another, whose sweep was killed after the first of its timesteps."""
    root = project(tmp_path_factory.mktemp("killed") / "project", undisturbed)
    command = program.start(root, *SWEEP)
    while command.process.is_alive() and not list(root.glob(".pipeline/sweep/*/t-*.json")):
        time.sleep(0.002)
    command.process.kill()
    assert command.end() == -9, command.output
    assert not (root / "analysis").exists()
    return root


@pytest.fixture
def killed(undisturbed, killed_once, tmp_path):
    """A copy of that, and the folder of what is kept."""
    root = project(tmp_path / "project", undisturbed)
    shutil.copytree(killed_once / ".pipeline", root / ".pipeline")
    (kept,) = (root / ".pipeline" / "sweep").iterdir()
    return root, kept


def outputs(root):
    return program.contents(root / "analysis" / "sweep")


def test_a_killed_sweep_goes_on_to_the_same_bytes_and_keeps_nothing(undisturbed, killed):
    root, kept = killed
    done = len(list(kept.glob("*.json")))
    assert 0 < done < 4
    assert f"resuming: {done} of 4 timesteps are done" in program.succeed(root, *SWEEP)
    assert outputs(root) == outputs(undisturbed)
    assert not kept.exists()


def test_what_is_damaged_is_swept_again(undisturbed, killed):
    root, kept = killed
    for file in kept.glob("*.json"):
        file.write_text(file.read_text().replace('"probe_accuracy": 0.', '"probe_accuracy": 0.1'))
    said = program.succeed(root, *SWEEP)
    assert "t-00100.json cannot be used" in said and "resuming" not in said
    assert outputs(root) == outputs(undisturbed)


def test_other_settings_take_nothing_of_it(killed):
    root, kept = killed
    for setting in ("sweep_features.margin_images=3", "extract_features.noise_seed=1"):
        said = program.succeed(root, "sweep-features", "--timesteps", "[100]", "--set", setting)
        assert "resuming" not in said
    assert kept.exists()


def test_other_timesteps_and_another_tolerance_take_what_is_there(killed):
    root, _ = killed
    said = program.succeed(root, "sweep-features", "--timesteps", "[100, 700]", "--tolerance", "0.1")
    assert "resuming: 1 of 2 timesteps are done" in said
    rows = json.loads((root / "analysis" / "sweep" / "sweep.json").read_text())["rows"]
    assert {row["timestep"] for row in rows} == {100, 700}


def test_two_sweeps_at_a_time_are_one_too_many(killed):
    root, _ = killed
    with locks.held(root / ".pipeline" / "locks" / "sweep", "a sweep"):
        program.refuse(root, *SWEEP, says=["analysis/sweep is being made by process"])


def test_what_is_kept_comes_back_as_it_was(tmp_path):
    kept = Kept(tmp_path / "kept")
    candidate = Candidate(7, ["a", "b"], [3, 4], Scores(0.1, 0.2, 0.3, 1 / 3), {"margin": 0.7})
    colours = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    kept.save(7, Swept([candidate], {"a": colours}))
    found = kept.load(7)
    assert found.candidates == [candidate]
    assert found.colours["a"].dtype == np.uint8 and np.array_equal(found.colours["a"], colours)
    assert kept.load(8) is None
    kept.remove()
    assert kept.load(7) is None and not (tmp_path / "kept").exists()
    kept.remove()
