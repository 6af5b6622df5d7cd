"""A sweep reuses finished timesteps, gives the bytes of a sweep from scratch, and uses no stale results."""

import json
import shutil
import subprocess
import time

import numpy as np
import pytest

from pipeline.io import locks
from pipeline.settings import config
from stages.analyze_features.probes import Scores
from stages.analyze_features.sweep import plan
from stages.analyze_features.sweep.cache import SweepCache, SweepResult
from stages.analyze_features.sweep.recommend import Candidate
from tests.conftest import REPOSITORY
from tests.faults import program

SWEEP = ("sweep-features", "--timesteps", "[100, 200, 300, 400]")


def project(root, made=None):
    """A small project at `root` that uses the data and model of another one."""
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
    """A project whose sweep was killed after its first timestep."""
    root = project(tmp_path_factory.mktemp("killed") / "project", undisturbed)
    command = program.start(root, *SWEEP)
    while command.process.is_alive() and not list(root.glob(".pipeline/sweep/*/t-*.safetensors")):
        time.sleep(0.002)
    command.process.kill()
    assert command.end() == -9, command.output
    assert not (root / "analysis").exists()
    return root


@pytest.fixture
def killed(undisturbed, killed_once, tmp_path):
    """A copy of the killed project, and the folder of its cached results."""
    root = project(tmp_path / "project", undisturbed)
    shutil.copytree(killed_once / ".pipeline", root / ".pipeline")
    (kept,) = (root / ".pipeline" / "sweep").iterdir()
    return root, kept


def outputs(root):
    return program.contents(root / "analysis" / "sweep")


def test_a_killed_sweep_resumes_with_identical_bytes(undisturbed, killed):
    root, kept = killed
    done = len(list(kept.glob("*.safetensors")))
    assert 0 < done < 4
    (kept.parent / "of-another-key").mkdir()
    assert f"timesteps     4, {done} of them done" in program.succeed(root, *SWEEP)
    assert outputs(root) == outputs(undisturbed)
    assert list(kept.parent.iterdir()) == [kept]
    assert len(list(kept.glob("*.safetensors"))) == 4


def test_another_rule_after_a_finished_sweep_needs_no_model(undisturbed, tmp_path):
    """Finished timesteps remain usable after params.yaml was edited, which makes a clean commit dirty."""
    scratch, again = (project(tmp_path / name, undisturbed) for name in ("scratch", "again"))
    rule = (*SWEEP, "--standard-errors", "3.5")
    program.succeed(scratch, *rule)
    shutil.copytree(undisturbed / ".pipeline", again / ".pipeline")
    (again / "models").unlink()
    program.succeed(again, *rule)
    assert outputs(again) == outputs(scratch) != outputs(undisturbed)
    package = REPOSITORY / "pipeline"
    for command in (
        ["init", "--quiet"],
        [f"--work-tree={package}", "add", f"{package}/provenance.py"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=all"],
    ):
        subprocess.run(["git", *command], cwd=again, check=True)
    of_a_commit = program.Conditions(environment={"GIT_DIR": str(again / ".git")})
    program.succeed(again, *rule, under=of_a_commit)
    assert json.loads(outputs(again)["sweep.json"])["made_of"]["commit"]


def test_damaged_results_are_recomputed(undisturbed, killed):
    root, kept = killed
    for file in kept.glob("*.safetensors"):
        content = file.read_bytes()
        at = content.index(b"probe_accuracy") + len(b'probe_accuracy\\": 0.')
        file.write_bytes(content[:at] + (b"1" if content[at:][:1] != b"1" else b"2") + content[at + 1 :])
    said = program.succeed(root, *SWEEP)
    assert (
        "t-00100.safetensors is damaged (its checksum does not match). Computing it again." in said
        and "4, 0 of them done" in said
    )
    assert outputs(root) == outputs(undisturbed)


@pytest.mark.parametrize("setting", ["sweep_features.margin_images=3", "extract_features.noise_seed=1"])
def test_other_settings_do_not_reuse_results(killed, setting):
    root, kept = killed
    said = program.succeed(root, "sweep-features", "--timesteps", "[100]", "--set", setting)
    assert "1, 0 of them done" in said
    assert not kept.exists() and len(list(kept.parent.iterdir())) == 1


def test_other_timesteps_reuse_finished_results(killed):
    root, kept = killed
    said = program.succeed(root, "sweep-features", "--timesteps", "[100, 700]")
    assert "2, 1 of them done" in said
    rows = json.loads((root / "analysis" / "sweep" / "sweep.json").read_text())["rows"]
    assert {row["timestep"] for row in rows} == {100, 700}
    assert (kept / "t-00700.safetensors").exists()


def test_a_dry_run_prints_the_remaining_work_and_changes_nothing(killed):
    root, kept = killed
    done = len(list(kept.glob("*.safetensors")))
    (root / "models").unlink()
    before = program.contents(root)
    said = program.succeed(root, *SWEEP, "--dry-run", "--images", "20", "--margin-images", "30").splitlines()
    assert said == [
        "images        20 of 24, 20 of them also under 2 prompts each",
        "timesteps     4, 0 of them done",
        "passes        60 per timestep, 240 to go",
    ]
    said = program.succeed(root, *SWEEP, "--dry-run")
    passes = 24 + 2 * 2
    assert f"4, {done} of them done" in said and f"{passes} per timestep, {(4 - done) * passes} to go" in said
    assert program.contents(root) == before


def test_a_second_sweep_at_the_same_time_is_rejected(killed):
    root, _ = killed
    with locks.held(root / ".pipeline" / "locks" / "sweep", "a sweep"):
        program.refuse(root, *SWEEP, says=["analysis/sweep is being written by process"])


def test_cached_results_are_loaded_unchanged(tmp_path):
    kept, other = SweepCache(tmp_path / "kept"), SweepCache(tmp_path / "other")
    candidate = Candidate(7, ["a", "b"], [3, 4], Scores(0.1, 0.02, 0.2, 0.3, 1 / 3), {"margin": 0.7})
    colours = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    for place in (kept, other):
        place.save(7, SweepResult([candidate], ["b"], {"a": colours}))
    kept.remove_others()
    found = kept.load(7)
    assert found.candidates == [candidate] and found.own_layers == ["b"]
    assert found.colours["a"].dtype == np.uint8 and np.array_equal(found.colours["a"], colours)
    assert kept.load(8) is None
    assert other.load(7) is None and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("setting", "other"),
    [
        ("sweep_features.images", 15),
        ("sweep_features.basis_images", 11),
        ("sweep_features.margin_images", 3),
        ("sweep_features.max_dims", 7),
        ("sweep_features.picture_images", 3),
        ("analyze_features.seed", 9),
        ("analyze_features.splits", 2),
        ("extract_features.prompts", "self-supervised"),
        ("extract_features.denoise_prompt", "hello"),
        ("extract_features.noise_seed", 9),
        ("runtime.unet_batch_size", 32),
    ],
)
def test_everything_that_decides_the_numbers_is_part_of_the_cache_key(undisturbed, setting, other):
    def folder(**overrides):
        return plan.make(config.load(undisturbed / "params.yaml", overrides)).cache.folder

    assert folder(**{"sweep_features.standard_errors": 3.0, "sweep_features.timesteps": [7]}) == folder()
    assert folder(**{setting: other}) != folder()
