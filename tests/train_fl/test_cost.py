"""The estimate of a run says what the run then does."""

import csv
import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.settings.params import Guidance
from stages import train_fl
from stages.train_fl import cost
from stages.train_fl.planned import PlannedSource
from tests.conftest import invoke, write_params
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


def test_a_finished_run_is_named(tmp_path):
    project = tiny_project.make(tmp_path, train_fl__num_rounds=1)
    assert "in place" not in lines(project, "fedavg")
    path = train_fl.run(project, "fedavg", "dir", 0)
    assert lines(project, "fedavg")["in place"] == f"{path} holds this run, finished: a run keeps it"
    found = [replace(train_fl.estimate(project, "fedavg", "dir", seed), start_seconds=3e4) for seed in (0, 1, 2)]
    assert train_fl.total(found) == "in all        16.7 h for 3 runs one after the other, 1 of them finished"
    other = tiny_project.make(tmp_path, train_fl__num_rounds=2)
    said = lines(other, "fedavg")["in place"]
    assert (
        said.startswith("a run would end at once: ") and "of other settings or data (train_fl.num_rounds). Move" in said
    )
    replaced = train_fl.estimate(other, "fedavg", "dir", 0, overwrite=True).lines()
    assert f"in place      a run replaces {path}" in replaced


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


def test_memory_has_the_data_that_are_kept_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.memory.peak", lambda: 0)
    project = tiny_project.make(tmp_path)
    # 48 training and 24 held-out images of 8 x 8 pixels; for partition.json, two numbers of 8 bytes for each of 4
    # clients and 3 classes, and 40 bytes for each training image
    partition = 2 * 8 * 4 * 3 + 40 * 48
    assert lines(project, "fedavg")["memory"].startswith(f"{(72 * 192 + partition) / 1000:.1f} kB per process")
    monkeypatch.setattr("pipeline.memory.available", lambda: 8_000)
    assert lines(project, "fedavg")["memory"].startswith(f"{(24 * 192 + partition) / 1000:.2f} kB per process")


def test_time_has_that_to_start(tmp_path):
    project, now = tiny_project.make(tmp_path), time.perf_counter()
    found = train_fl.estimate(project, "fedavg", "dir", 0, started=now - 1000)
    assert 1000 < found.start_seconds < 1000 + time.perf_counter() - now < found.seconds + 1
    assert "17 min to start" in found.lines()[-1]
    assert train_fl.estimate(project, "fedavg", "dir", 0).start_seconds < 1000


def test_a_feature_set_need_not_exist(extracted, tmp_path):
    def lines_of(*folders):
        root = tmp_path / str(len(folders))
        root.mkdir()
        write_params(root, {})
        for folder in folders:
            (root / folder).parent.mkdir(exist_ok=True)
            (root / folder).symlink_to(extracted / folder)
        words = ("train-fl", "--method", "feddifrc", "--partition", "dir05", "--dry-run")
        return invoke(root, *words).output.splitlines()

    shared = ("data/datasets", "data/backbones")
    exists, planned = lines_of(*shared, "data/features", "models"), lines_of(*shared, "models")
    place = next(place for place, line in enumerate(exists) if line.startswith("guidance"))
    assert planned[place] == exists[place] + " (of a set that is yet to be extracted)"
    count = next(place for place, line in enumerate(exists) if line.startswith("checkpoint"))
    assert planned[:place] == exists[:place] and planned[place + 1 : count] == exists[place + 1 : count]
    (error,) = lines_of(*shared)  # without the model, how many numbers the features have is not known
    assert "holds no feature set yet" in error and "no frozen model to plan one. Run `pipeline prepare-b" in error


def test_planned_targets_are_those_of_the_terms_in_use():
    settings = Guidance(layers="all", tdcl_weight=1.0, ndcr_weight=0.0)
    source = PlannedSource(settings, num_prompts=3, num_dims=5)
    found = source.read(np.arange(7))
    assert found.denoised.shape == (7, 0) and found.prompted.shape == (7, 3, 5)
    assert torch.allclose(found.prompted.norm(dim=-1), torch.ones(7, 3))
    assert source.bytes_per_sample() == 3 * 5 * 4 + 8
    both = PlannedSource(settings.model_copy(update={"ndcr_weight": 1.0}), 3, 5)
    assert both.read(np.arange(7)).denoised.shape == (7, 5) and both.bytes_per_sample() == 4 * 5 * 4 + 8


def test_evaluation_by_embeddings_is_counted(tmp_path):
    project = tiny_project.make(tmp_path, train_fl__augmentation="views")
    # 24 held-out images after each of 4 rounds and four times at the end, 48 training images as often but for one time
    assert train_fl.estimate(project, "simsiam", "dir", 0).evaluated == 8 * 24 + 7 * 48
    found = train_fl.estimate(project, "fedavg", "dir", 0)
    assert found.evaluated == 6 * 24 + 48
    found = replace(found, start_seconds=1, steps=6, seconds_per_step=2, seconds_per_image=0.5, workers=2)
    assert found.seconds == 1 + 6 * 2 / 2 + (6 * 24 + 48) * 0.5


def test_threads_evaluate_whole_batches():
    # of 250 images in batches of 100, 100 and 50, one thread has all, each of two at most two batches, of four one
    assert [cost._of_busiest(250, threads) for threads in (1, 2, 4)] == [250, 200, 100]
    assert cost._of_busiest(7, 4) == 7


def test_a_set_that_would_not_suit_the_method_is_rejected(extracted, tmp_path):
    write_params(tmp_path, {"train_fl.augmentation": "views"})
    for folder in ("data/datasets", "data/backbones", "models"):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        (tmp_path / folder).symlink_to(extracted / folder)
    result = invoke(tmp_path, "train-fl", "--method", "feddifrc-ssl", "--partition", "dir05", "--dry-run")
    assert result.exit_code == 1
    assert "asks for a feature set with prompts that name each image's class, which training without" in result.output


def test_the_command_prints_an_estimate_for_every_seed(project):
    result = invoke(project, "train-fl", "--method", "fedavg", "--partition", "dir05", "--seed", "0", "--seed", "1",
                    "--dry-run")  # fmt: skip
    assert result.exit_code == 0
    assert [line.split()[1] for line in result.output.splitlines() if line.startswith("run ")] == [
        "fedavg-dir05-s0",
        "fedavg-dir05-s1",
    ]
    assert re.search(r"\nin all +\d.* for 2 runs one after the other\n$", result.output)
    assert not (project / "results").exists()
    result = invoke(project, "train-fl", "--method", "nothing", "--partition", "dir05", "--seed", "0", "--dry-run")
    assert result.exit_code == 1 and "nothing" in result.output
