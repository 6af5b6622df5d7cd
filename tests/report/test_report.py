"""The report: its numbers, the runs it rejects, and that it modifies nothing else."""

import hashlib
import json
import os
import shlex
import shutil

import numpy as np
import pytest

from pipeline.errors import DataError
from stages.report import read_runs
from tests.conftest import invoke, write_params
from tests.report.grid import reseal, write_grid

TRAIN = ("train-fl", "--partition", "dir05", "--method", "fedavg", "--seed", "0", "--seed", "1")


@pytest.fixture(scope="module")
def trained_once(extracted, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    write_params(root, {"sweep.methods": ["fedavg"], "sweep.seeds": [0, 1]})
    (root / "data").symlink_to(extracted / "data")
    assert invoke(root, *TRAIN).exit_code == 0
    return root


@pytest.fixture
def trained(trained_once, tmp_path):
    return shutil.copytree(trained_once, tmp_path / "project", symlinks=True)


def test_summary_holds_mean_and_sample_deviation_over_seeds(trained):
    for seed, accuracy in ((0, 0.5), (1, 0.7)):
        file = trained / "results" / "fedavg-dir05" / f"s{seed}" / "metrics.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"mean_last5_accuracy": accuracy}))
        reseal(file.parent)
    assert invoke(trained, "report").exit_code == 0
    summary = json.loads((trained / "report" / "summary.json").read_text())["dir05"]["fedavg"]
    assert summary["mean_accuracy"] == pytest.approx(0.6)
    assert summary["std_accuracy"] == pytest.approx(np.sqrt(0.02))  # deviations 0.1 and 0.1, divided by n - 1
    assert "60.00 ± 14.14" in (trained / "report" / "index.html").read_text()
    invoke(trained, "report", "--set", "sweep.seeds=[1]")
    assert "<b>70.00</b>" not in (
        page := (trained / "report" / "index.html").read_text()
    )  # a single method is not the best
    assert "70.00</td>" in page and "±" not in page.partition('id="curves"')[0].partition('id="accuracy"')[2]


def test_rejects_runs_of_other_settings(trained):
    result = invoke(trained, "report", "--set", "train_fl.num_rounds=7")
    assert result.exit_code == 1
    assert "fedavg-dir05/s0 was trained with train_fl.num_rounds 2, but params.yaml has 7. Retrain it" in result.output


def test_reports_runs_trained_with_overrides_when_given_the_flags_in_the_error_message(trained):
    changed = [
        f"--set={key}" for key in ("train_fl.num_rounds=1", "train_fl.normalisation=group", "partitions.dir05.alpha=2")
    ]
    flags = (*changed, "--overwrite")
    assert invoke(trained, *TRAIN, *flags).exit_code == 0
    result = invoke(trained, "report")
    assert result.exit_code == 1
    named = shlex.split(result.output.partition("report it unchanged with ")[2].strip().removesuffix("."))
    assert "partitions.dir05.alpha=2.0" in named and "train_fl.normalisation=group" in named
    assert invoke(trained, "report", *named).exit_code == 0


def test_rejects_runs_of_other_data(trained):
    file = trained / "results" / "fedavg-dir05" / "s1" / "config.json"
    settings = json.loads(file.read_text())
    for changes, message in (
        (
            {"dataset": {"name": "digits", "hash": "x"}},
            "fedavg-dir05-s1 were trained on different versions of the data set",
        ),
        (
            {"dataset": {"name": "x", "hash": "x"}},
            "fedavg-dir05/s1 was trained with prepare_data.name x, but params.yaml has digits",
        ),
    ):
        file.write_text(json.dumps(settings | changes))
        reseal(file.parent)
        result = invoke(trained, "report")
        assert result.exit_code == 1 and message in result.output


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"dataset": {"name": "digits", "hash": "x"}}, "datasets/digits"),
        ({"features": "x"}, "features/digits-tiny-sd-t300"),
    ],
)
def test_names_images_or_features_that_have_changed_since(trained, changes, place):
    assert "other data" not in invoke(trained, "report").output
    for seed in (0, 1):
        file = trained / "results" / "fedavg-dir05" / f"s{seed}" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        reseal(file.parent)
    said = f"Runs were trained from other data than {trained / 'data' / place} now has"
    assert said in invoke(trained, "report").output


def test_names_runs_outside_the_sweep(trained):
    result = invoke(trained, "report", "--set", "sweep.seeds=[0]")
    assert "the sweep does not list them: fedavg-dir05-s1\n" in result.output
    assert "one run, seed 0 (n = 1)" in (trained / "report" / "index.html").read_text()


def test_files_are_replaced_rather_than_modified(trained, tmp_path_factory):
    """DVC links files of its cache into the project; modifying them in place would corrupt the cache."""
    assert invoke(trained, "report").exit_code == 0
    cache = tmp_path_factory.mktemp("cache")
    files = [path for top in ("report", "results") for path in (trained / top).rglob("*") if path.is_file()]
    before = {}
    for number, file in enumerate(files):
        os.link(file, cache / str(number))
        before[cache / str(number)] = file.read_bytes()
    assert invoke(trained, *TRAIN, "--overwrite", "--num-rounds", "1").exit_code == 0
    assert invoke(trained, "report", "--title", "another", "--set", "train_fl.num_rounds=1").exit_code == 0
    assert len(before) > 10
    assert all(linked.read_bytes() == content for linked, content in before.items())


def test_a_restarted_run_does_not_count_as_finished(trained):
    run = trained / "results" / "fedavg-dir05" / "s0"
    result = invoke(trained, *TRAIN, "--overwrite", "--learning-rate", "1e30")
    assert result.exit_code == 1 and "training diverged" in result.output
    assert not (run / "metrics.json").exists()


def digests(root):
    """File -> its lines, of results/.sweep."""
    return {file.name: file.read_text().splitlines() for file in (root / "results" / ".sweep").iterdir()}


def line(root, method, seed):
    sums = (root / "results" / f"{method}-dir05" / f"s{seed}" / "SHA256SUMS").read_bytes()
    return f"{hashlib.sha256(sums).hexdigest()}  s{seed}"


def test_only_runs_of_the_sweep_get_a_digest_for_dvc(trained):
    fedavg = {"fedavg-dir05.sha256": [line(trained, "fedavg", seed) for seed in (0, 1)]}
    assert digests(trained) == fedavg
    by_hand = ("train-fl", "--partition", "dir05", "--seed", "0")
    assert invoke(trained, *by_hand, "--method", "fedprox").exit_code == 0
    assert invoke(trained, *TRAIN, "--seed", "7").exit_code == 0
    assert digests(trained) == fedavg
    write_params(trained, {"sweep.methods": ["fedavg"], "sweep.seeds": [1]})
    assert invoke(trained, "report").exit_code == 0
    assert digests(trained) == {"fedavg-dir05.sha256": [line(trained, "fedavg", 1)]}
    write_params(trained, {"sweep.methods": ["fedavg", "fedprox"], "sweep.seeds": [0]})
    assert invoke(trained, "report").exit_code == 0  # fedprox was trained before the sweep listed it
    of_zero = {f"{method}-dir05.sha256": [line(trained, method, 0)] for method in ("fedavg", "fedprox")}
    assert digests(trained) == of_zero


def test_means_over_seeds_are_written_by_the_last_run_of_the_sweep(trained):
    file = trained / "results" / "fedavg-dir05.json"
    of_seeds = [json.loads((file.parent / "fedavg-dir05" / f"s{s}" / "metrics.json").read_text()) for s in (0, 1)]
    expected = {name: pytest.approx((of_seeds[0][name] + of_seeds[1][name]) / 2) for name in of_seeds[0]}
    apart = of_seeds[0]["mean_last5_accuracy"] - of_seeds[1]["mean_last5_accuracy"]
    expected |= {"std": pytest.approx(abs(apart) / np.sqrt(2)), "num_seeds": 2}
    assert json.loads(file.read_text()) == expected
    file.unlink()
    assert invoke(trained, *TRAIN, "--seed", "5", "--set", "sweep.seeds=[0, 1, 5]").exit_code == 0
    assert invoke(trained, *TRAIN[:-4], "--seed", "5").exit_code == 0  # neither belongs to the sweep as written
    assert not file.exists()
    write_params(trained, {"sweep.methods": ["fedavg"], "sweep.seeds": [6, 0]})
    assert invoke(trained, *TRAIN[:-2]).exit_code == 0  # seed 0, while seed 6 is missing
    assert not file.exists()
    assert invoke(trained, *TRAIN[:-4]).exit_code == 0  # all seeds of the sweep
    assert json.loads(file.read_text())["num_seeds"] == 2


def test_rejects_a_run_that_replaced_a_run_of_the_sweep(trained):
    ours, other = (trained / "results" / "fedavg-dir05" / f"s{seed}" for seed in (0, 1))
    file = trained / "results" / ".sweep" / "fedavg-dir05.sha256"
    shutil.rmtree(ours)
    shutil.copytree(other, ours)
    refused = invoke(trained, "report")
    assert refused.exit_code == 1
    assert refused.output.startswith(f"Error: {ours} is not the run that {file} was written for (checksums differ).")
    file.unlink()
    refused = invoke(trained, "report")  # otherwise seed 1 would count twice
    assert refused.exit_code == 1 and "have the same method, partition and seed" in refused.output


def test_accepts_another_run_of_the_same_seed_when_its_digest_is_removed(trained):
    file = trained / "results" / ".sweep" / "fedavg-dir05.sha256"
    file.write_text(f"{'0' * 64}  s0\n")  # as if the run were another one than DVC knows
    assert invoke(trained, "report").exit_code == 1
    file.unlink()
    accepted = invoke(trained, "report")
    assert accepted.exit_code == 0, accepted.output


def test_missing_runs_are_named_with_flags_for_those_that_are_there(trained):
    flags = ("--set=sweep.methods=[moon, fedavg]", "--set=sweep.seeds=[1, 0, 2]")
    said = invoke(trained, "report", *flags).output
    assert "4 of the 6 runs of the sweep are missing (moon-dir05-s1, ...). Run `dvc repro`, or report fewer" in said
    named = shlex.split(said.partition("for example with ")[2].strip().removesuffix("."))
    assert named[1::2] == ["sweep.methods=[fedavg]", "sweep.partitions=[dir05]", "sweep.seeds=[1]"]
    assert invoke(trained, "report", *named).exit_code == 0


def test_runs_in_the_folders_of_an_earlier_version_are_named(trained):
    results = trained / "results"
    for seed in (0, 1):
        (results / "fedavg-dir05" / f"s{seed}").rename(results / f"fedavg-dir05-s{seed}")
    said = invoke(trained, "report")
    assert said.exit_code == 1 and "2 of the 2 runs of the sweep are missing" in said.output
    first, more = results / "fedavg-dir05-s0", results / "fedavg-dir05" / "s0"
    assert said.output.startswith(f"{first} and 1 more: made by an earlier version. Move it to {more} to use it.\n")
    with pytest.raises(DataError, match="no finished run"):
        read_runs(results)
    for seed in (0, 1):
        (results / f"fedavg-dir05-s{seed}").rename(results / "fedavg-dir05" / f"s{seed}")
    assert "earlier version" not in invoke(trained, "report").output
    assert [run.name for run in read_runs(results)] == ["fedavg-dir05-s0", "fedavg-dir05-s1"]


def test_printing_tables_writes_no_files(trained):
    shutil.rmtree(trained / "results" / ".sweep")
    assert invoke(trained, "report", "--format", "markdown").exit_code == 0
    assert not (trained / "results" / ".sweep").exists()


def test_the_page_of_ten_thousand_clients_is_small(tmp_path):
    root = write_grid(tmp_path, ["fedavg"], ["dir005"], [0], num_rounds=2, num_clients=10_000)
    assert invoke(root, "report").exit_code == 0
    page = root / "report" / "index.html"
    assert page.stat().st_size < 1_000_000  # a dot per client and class took 19 MB for each partition
    assert "mean of blocks of 50 x 1" in page.read_text()
