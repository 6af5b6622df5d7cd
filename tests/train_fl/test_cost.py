"""The estimate of a run says what the run then does."""

import csv
import json
import re

import pytest

from stages import train_fl
from tests.conftest import invoke
from tests.train_fl import tiny_project


def lines(project, method, seed=0):
    text = train_fl.estimate(project, method, "dir", seed).lines()
    return {line[:14].strip(): line[14:] for line in text}


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_steps_and_bytes_are_those_of_the_run(tmp_path, method):
    project = tiny_project.make(tmp_path, train_fl__local_epochs=2)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    found = train_fl.estimate(project, method, "dir", 3)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before  # nothing is written
    path = train_fl.run(project, method, "dir", 3)
    with (path / "rounds.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert found.rounds == len(rows) == 4 and found.samples == 48
    for row in rows:
        assert int(row["num_clients"]) == found.participants == 2
        assert int(row["bytes_down"]) == 2 * found.down and int(row["bytes_up"]) == 2 * found.up
    # batches of 8 images, the last of which may be smaller, in two epochs
    sizes = [sum(own) for own in json.loads((path / "partition.json").read_text())["label_counts"]]
    counts = {sum(pair): 2 * sum(-(-one // 8) for one in pair) for pair in _pairs(sizes)}
    assert found.steps == sum(counts[int(row["num_samples"]) // 2] for row in rows)
    # SCAFFOLD's control variates are as large as the parameters, for the server and each client that took part
    weights = sum(value.nbytes for value in _weights(path).values())
    assert found.model == weights
    assert (found.server_state > weights) == (found.client_states > 0) == (method == "scaffold")


def _pairs(sizes):
    pairs = [(one, other) for place, one in enumerate(sizes) for other in sizes[:place]]
    assert len({sum(pair) for pair in pairs}) == len(pairs)  # so that a round's samples say who took part
    return pairs


def _weights(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def test_lines_say_where_the_data_are_kept(tmp_path, monkeypatch):
    project = tiny_project.make(tmp_path)
    tiny_project.add_features(project)
    found = lines(project, "feddifrc")
    assert found["clients"].startswith("4; 2 per round, 4 rounds")
    assert found["images"] == "9.22 kB, in memory" and found["guidance"] == "4.99 kB, in memory"
    assert re.fullmatch(r".* of the server, 0 B of the clients \(.*B are free\)", found["checkpoint"])
    assert "per process" in found["memory"] and re.match(r"about \d+ of ", found["descriptors"])
    monkeypatch.setattr("pipeline.memory.available", lambda: 8_000)
    found = lines(project, "feddifrc")
    assert found["images"] == "9.22 kB, read from disk batch by batch" and found["held out"] == "4.61 kB, in memory"


def test_evaluation_by_embeddings_is_counted(tmp_path):
    project = tiny_project.make(tmp_path, train_fl__augmentation="views")
    # 24 held-out images after each of 4 rounds and at the end, and the 48 training images as often
    assert train_fl.estimate(project, "simsiam", "dir", 0).evaluated == 5 * (24 + 48)
    assert train_fl.estimate(project, "fedavg", "dir", 0).evaluated == 5 * 24 + 48


def test_the_command_prints_an_estimate_for_every_seed(project):
    result = invoke(project, "train-fl", "--method", "fedavg", "--partition", "dir05", "--seed", "0", "--seed", "1",
                    "--dry-run")  # fmt: skip
    assert result.exit_code == 0
    assert [line.split()[1] for line in result.output.splitlines() if line.startswith("run ")] == [
        "fedavg-dir05-s0",
        "fedavg-dir05-s1",
    ]
    assert not (project / "results").exists()
    result = invoke(project, "train-fl", "--method", "nothing", "--partition", "dir05", "--seed", "0", "--dry-run")
    assert result.exit_code == 1 and "nothing" in result.output
