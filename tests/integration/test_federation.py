"""Real SuperLinks and SuperNodes on loopback: from private folders to a model, with a killed node; TLS and keys."""

import csv
import json
import signal
import time

import pytest
from safetensors.torch import load_file

from examples.federation.demo import NAMES, REPOSITORY, SETTINGS, make_projects, pipeline
from examples.federation.loopback import Loopback
from tests.conftest import SMALL as SMALL_PROJECT
from tests.conftest import write_params
from tests.integration.certificates import write_certificates, write_keys

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


def test_three_nodes_train_a_model_although_one_is_killed_in_round_2(tmp_path):
    projects = make_projects(tmp_path, 30, SMALL)
    server = tmp_path / "server"
    with Loopback(tmp_path, REPOSITORY) as federation:
        for client, (name, project) in enumerate(zip(NAMES, projects, strict=True)):
            federation.start_node(client, project, name=name)
        made = federation.run(SMALL | {"federation.min_clients": 3}, task="basis")
        assert federation.wait(made, 300) == "finished:completed", federation.log(made)
        shared = (server / "data" / "basis.h5").read_bytes()
        assert [(project / "data" / "basis.h5").read_bytes() for project in projects] == [shared] * 3
        for project in projects:
            pipeline(project, "--quiet", "extract-features")
        trained = federation.run(SMALL | {"federation.round_timeout": 30.0}, seed=3)
        results = server / "results" / "feddifrc-nodes-s3"
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


def test_run_with_tls_and_registered_keys_has_the_bytes_of_the_local_engine(extracted, tmp_path):
    changes = {"train_fl.num_clients": 2, "train_fl.clients_per_round": 2, "train_fl.num_rounds": 2}
    write_params(tmp_path, changes)
    (tmp_path / "data").symlink_to(extracted / "data")
    pipeline(tmp_path, "--quiet", "train-fl", "--method", "scaffold", "--partition", "dir05", "--seed", "0")
    local = (tmp_path / "results" / "scaffold-dir05-s0" / "model.safetensors").read_bytes()
    certificates = write_certificates(tmp_path / "certificates")
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "data").symlink_to(extracted / "data")
    scalars = {key: value for key, value in SMALL_PROJECT.items() if not isinstance(value, list)}
    small = scalars | changes | {"federation.min_clients": 2}
    with Loopback(tmp_path, REPOSITORY, certificates, authenticate=True) as federation:
        for client in range(3):
            private, public = write_keys(tmp_path / "keys", f"node-{client}")
            if client < 2:  # the third is not registered
                federation.register(public)
            federation.start_node(client, tmp_path, "--auth-supernode-private-key", str(private), name=f"n{client}")
        run = federation.run(small, method="scaffold", partition="dir05")
        assert federation.wait(run, 300) == "finished:completed", federation.log(run)
    results = tmp_path / "server" / "results" / "scaffold-dir05-s0"
    assert {row["name"] for row in rows(results / "participation.csv")} == {"n0", "n1"}
    assert (results / "model.safetensors").read_bytes() == local


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """Use one thread for nodes and local engine: the number of threads changes last bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
