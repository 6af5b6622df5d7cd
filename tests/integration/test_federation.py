"""A real SuperLink and SuperNodes on loopback: from private folders to a model, with a killed node."""

import csv
import json
import signal
import time

import pytest
from safetensors.torch import load_file

from examples.federation import demo
from examples.federation.demo import NAMES, SETTINGS, make_projects
from examples.federation.loopback import Loopback
from tests.conftest import invoke

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = SETTINGS | {
    "extract_features.basis_images": 20,
    "extract_features.negatives": 1,
    "train_fl.local_epochs": 1,
    "train_fl.batch_size": 64,
    "train_fl.learning_rate": 0.01,
}


def rows(file):
    if not file.exists():
        return []
    with file.open() as stream:
        return list(csv.DictReader(stream))


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.1)


def in_this_process(project, *words):
    result = invoke(project, *words)
    assert result.exit_code == 0, result.output


def test_three_nodes_train_a_model_although_one_is_killed_in_round_2(tmp_path, app, quick_bin, monkeypatch):
    monkeypatch.setattr(demo, "pipeline", in_this_process)  # the nodes' own processes start later
    projects = make_projects(tmp_path, 30, SMALL)
    server = tmp_path / "server"
    with Loopback(tmp_path, app, programs=quick_bin) as federation:
        for client, (name, project) in enumerate(zip(NAMES, projects, strict=True)):
            federation.start_node(client, project, name=name)
        made = federation.run(SMALL | {"federation.min_clients": 3}, task="basis")
        assert federation.wait(made, 300) == "finished:completed", federation.log(made)
        shared = (server / "data" / "basis.h5").read_bytes()
        assert [(project / "data" / "basis.h5").read_bytes() for project in projects] == [shared] * 3
        for project in projects:
            in_this_process(project, "--quiet", "extract-features")
        trained = federation.run(SMALL | {"federation.round_timeout": 20.0}, seed=3)
        results = server / "results" / "feddifrc-nodes" / "s3"
        until(lambda: len(rows(results / "rounds.csv")) == 1, 300)
        federation.stop("node-1", signal.SIGKILL)
        assert federation.wait(trained, 300) == "finished:completed", federation.log(trained)
        said = federation.log(trained)
    participation = rows(results / "participation.csv")
    outcomes = {(int(row["round"]), row["name"]): row["outcome"] for row in participation}
    assert outcomes.pop((2, "hospital-b")) != "trained"
    assert {name for (number, name), outcome in outcomes.items() if number > 1 and outcome == "trained"} == {
        "hospital-a",
        "hospital-c",
    }
    assert "round 2 continues without client 1 (hospital-b)" in said
    assert len(rows(results / "rounds.csv")) == 3
    assert all(value.isfinite().all() for value in load_file(results / "model.safetensors").values())
    assert 0 <= json.loads((results / "metrics.json").read_text())["final_accuracy"] <= 1
    # no image or feature has left its folder
    assert {path.name for path in (server / "data").rglob("*") if path.is_file()} == {"basis.h5", "basis.json"}
