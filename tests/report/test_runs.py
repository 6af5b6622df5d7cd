"""Finished runs as Python objects, without params.yaml."""

import json
import math
import shutil

import numpy as np
import pytest

from pipeline.errors import DataError
from stages.report import read_run, read_runs, summary
from tests.conftest import invoke
from tests.report.grid import reseal, write_grid


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = write_grid(tmp_path_factory.mktemp("grid"), ["fedavg", "fedprox"], ["dir05", "iid"], [0, 1], num_rounds=3)
    return root / "results"


@pytest.fixture
def results(written, tmp_path):
    return shutil.copytree(written, tmp_path / "results")


def test_run_has_the_numbers_of_its_files(results):
    folder = results / "fedprox-iid" / "s1"
    (folder / "rounds.csv").write_text("round,accuracy,loss,num_samples\n1,0.25,2.5,60\n2,0.75,1.5,60\n")
    (folder / "clients.csv").write_text("client,num_samples,held_out_accuracy\n0,40,0.5\n1,20,\n")
    (folder / "metrics.json").write_text('{"mean_last5_accuracy": 0.5, "final_accuracy": 0.75}')
    reseal(folder)
    run = read_run(str(folder))
    assert (run.name, run.method, run.partition, run.seed) == ("fedprox-iid-s1", "fedprox", "iid", 1)
    assert run.rounds[1] == {"round": 2, "accuracy": 0.75, "loss": 1.5, "num_samples": 60}
    assert run.accuracy.tolist() == [0.25, 0.75] and run.loss.tolist() == [2.5, 1.5]
    assert run.clients[0]["held_out_accuracy"] == 0.5 and math.isnan(run.client_accuracy[1])
    assert run.metrics["mean_last5_accuracy"] == 0.5 and run.metrics["bytes_down"] == 10_000_000
    assert run.settings.dataset.name == "digits" and run.label_counts.shape == (10, 10)
    assert repr(run) == "Run(fedprox-iid-s1: accuracy 50.00 %, mean of all 2 rounds; 2 rounds, 2 clients)"


def test_summary_has_mean_and_deviation_over_seeds(results):
    for method, accuracies in (("fedavg", (0.5, 0.7)), ("fedprox", (0.6, 0.6))):
        for seed, accuracy in enumerate(accuracies):
            file = results / f"{method}-dir05" / f"s{seed}" / "metrics.json"
            file.write_text(f'{{"mean_last5_accuracy": {accuracy}, "final_accuracy": 0}}')
            reseal(file.parent)
    found = summary(read_runs(results, "*-dir05-*"))
    assert [(row["method"], row["partition"], row["num_seeds"]) for row in found.rows] == [
        ("fedavg", "dir05", 2),
        ("fedprox", "dir05", 2),
    ]
    assert found.rows[0]["mean_accuracy"] == pytest.approx(0.6)
    assert found.rows[0]["std_accuracy"] == pytest.approx(np.sqrt(0.02))  # deviations 0.1 and 0.1, divided by n - 1
    assert repr(found).splitlines() == [
        "method            dir05",
        "--------  -------------",
        "fedavg    60.00 ± 14.14",
        "fedprox    60.00 ± 0.00",
        "Accuracy, %, mean of all 3 rounds; mean ± standard deviation over seeds 0, 1 (n = 2).",
    ]


def test_summary_shows_gaps_and_leaves_out_the_deviation_of_one_seed(results):
    runs = [run for run in read_runs(results) if run.seed == 0 and run.name != "fedprox-iid-s0"]
    found = summary(runs)
    assert len(found.rows) == 3 and all(row["std_accuracy"] is None for row in found.rows)
    lines = repr(found).splitlines()
    assert lines[3].endswith("–") and lines[-1].endswith("one run, seed 0 (n = 1).")


def test_unfinished_runs_are_skipped_and_named_when_read(results):
    (results / "fedavg-iid" / "s0" / "SHA256SUMS").unlink()
    assert "fedavg-iid-s0" not in [run.name for run in read_runs(results)] and len(read_runs(results)) == 7
    with pytest.raises(DataError, match="fedavg-iid/s0 holds no finished run .*SHA256SUMS is missing"):
        read_run(results / "fedavg-iid" / "s0")


def test_checksums_that_lack_a_file_are_named_as_such(results):
    file = results / "fedavg-iid" / "s0" / "SHA256SUMS"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "details" not in line))
    with pytest.raises(DataError, match="SHA256SUMS does not list all files of the run. Train it again"):
        read_run(file.parent)


def as_if_over_nodes(folder):
    """Make a run one whose clients have images of their own."""
    (folder / "partition.json").unlink()
    (folder / "clients.csv").unlink()
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"partition": {"name": "iid", "kind": "nodes"}, "agreed": {"class_names": ["a", "b"]}}
    (folder / "config.json").write_text(json.dumps(settings))
    reseal(folder)


def test_runs_over_nodes_with_their_own_images_have_no_clients(results):
    as_if_over_nodes(results / "fedavg-iid" / "s0")
    run = next(run for run in read_runs(results) if run.name == "fedavg-iid-s0")
    assert (run.class_names, run.clients, run.label_counts.size, run.heterogeneity) == (["a", "b"], [], 0, {})
    assert repr(run).endswith("; 3 rounds)") and len(summary([run]).rows) == 1


def test_report_refuses_runs_over_nodes_with_their_own_images(tmp_path):
    root = write_grid(tmp_path, ["fedavg"], ["iid"], [0], num_rounds=3)
    as_if_over_nodes(root / "results" / "fedavg-iid" / "s0")
    said = invoke(root, "report", "--set", "partitions.iid={kind: nodes}")
    assert said.exit_code == 1 and "images of their own, which the report cannot show. Remove it" in said.output


@pytest.mark.parametrize("name", ["partition.json", "clients.csv"])
def test_other_runs_need_the_files_of_their_clients(results, name):
    (results / "fedavg-iid" / "s0" / name).unlink()
    with pytest.raises(DataError, match=f"holds no finished run .*{name} is missing"):
        read_run(results / "fedavg-iid" / "s0")


@pytest.mark.parametrize("name", ["rounds.csv", "clients.csv", "config.json", "metrics.json"])
@pytest.mark.parametrize("is_resealed", [False, True])
@pytest.mark.parametrize("content", ["", "round,accuracy,loss,held_out_accuracy\n1,2\n", "[1]", "a\0\n", "x,y\n1,2\n"])
def test_damaged_runs_are_one_error(results, name, is_resealed, content):
    folder = results / "fedavg-iid" / "s0"
    (folder / name).write_text(content)
    if is_resealed:
        reseal(folder)
    with pytest.raises(DataError, match=name):
        read_run(folder)


def test_nothing_to_read_or_summarise_is_an_error(results, tmp_path):
    with pytest.raises(DataError, match="no finished run named moon"):
        read_runs(results, "moon*")
    with pytest.raises(DataError, match="no finished run"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no runs"):
        summary([])
    run = read_run(results / "fedavg-iid" / "s0")
    with pytest.raises(DataError, match="same method, partition and seed"):
        summary([run, run])
