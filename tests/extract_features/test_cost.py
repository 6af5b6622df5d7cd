"""The estimate of an extraction, by numbers derived on paper."""

from dataclasses import replace

import pytest

from pipeline import estimates
from pipeline.settings import config
from stages.extract_features import cost
from tests.conftest import invoke
from tests.extract_features.fixtures import project

pytestmark = pytest.mark.usefixtures("quick_dry_runs")

ESTIMATE = cost.Estimate(
    images=10, passes_per_image=3, basis_images=4, shards=5, rows_per_shard=2, vae_flops=10**9, pass_flops=2 * 10**9,
    num_bytes=1, start_seconds=7, seconds_per_encoding=1, seconds_per_pass=0.5, device="cuda", free_space="",
    process=[], processes=1,
)  # fmt: skip


# 7 s to start and 4 * (1 + 2 * 0.5) s for the basis; then an image takes 1 + 3 * 0.5 s. Two processes have 3 and 2 of
# the 5 shards of 2 images, eight have one at most.
@pytest.mark.parametrize(("processes", "seconds"), [(1, 15 + 25), (2, 15 + 15), (8, 15 + 5)])
def test_processes_share_whole_shards_after_the_basis(processes, seconds):
    estimate = replace(ESTIMATE, processes=processes)
    assert estimate.seconds == seconds
    said = estimate.lines()[-1]
    assert (
        said.startswith(f"time          {seconds} s on cuda, ")
        and "7 s to start, 8 s for the basis, then 0.4 im" in said
    )
    assert (f"{processes} processes, each with a GPU" in said and "/s each" in said) or processes == 1


def test_finished_shards_and_their_basis_take_no_time():
    resumed = replace(ESTIMATE, shards_done=3, processes=4)
    assert resumed.seconds == 7 + 2 * 2.5  # two shards of two images, by two of the processes
    said = resumed.lines()[-1]
    assert said.startswith("time          12 s for the 2 missing shards on cuda, 4 processes, each with a GPU")
    assert "of which 2 have work (one shard each) (7 s to start, 0 s for the basis, then 0.4 im" in said


def test_the_last_shard_may_be_smaller():
    assert replace(ESTIMATE, images=9).seconds == 15 + 9 * 2.5


def test_passes_for_the_basis_are_named_unless_it_is_shared():
    lines = ESTIMATE.lines()
    assert lines[1] == "passes        3 per image, 30 in all, and 8 for the basis"
    # 14 encodings of 1 GFLOP and 38 passes of 2 GFLOP
    assert lines[2].endswith("0.09 T in all")
    assert replace(ESTIMATE, basis_images=0).lines()[1] == "passes        3 per image, 30 in all"
    assert replace(ESTIMATE, basis_images=0).seconds == 7 + 25


def test_memory_has_three_copies_of_a_shards_features_and_two_of_its_images(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(estimates, "of_process", lambda *numbers: asked.append(numbers) or [])
    root = project(tmp_path / "p", images=20, rows_per_shard=8, negatives="all")
    cost.estimate(config.load(root / "params.yaml"))
    # 144 dims of 2 bytes for 11 representations; 10 numbers of prompts of 2 bytes; index and label
    row = 144 * 2 * 11 + 10 * 2 + 16
    assert asked == [("cpu", 8 * (3 * row + 2 * 3 * 32 * 32), 8 * row, 5)]


def test_processes_without_a_shard_are_named(extracted):
    lines = invoke(extracted, "extract-features", "--dry-run", "--processes", "8").output.splitlines()
    assert "8 processes, each with a GPU or a machine of its own, of which 3 have work (one shard each)" in lines[-1]


def test_only_a_dry_run_plans_for_processes(extracted):
    result = invoke(extracted, "extract-features", "--processes", "8")
    assert result.exit_code == 2 and "--processes needs --dry-run" in result.output
