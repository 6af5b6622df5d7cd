"""Any method over nodes: the same bytes as the local engine; nodes that fail are skipped and named."""

import csv
import gc
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import PipelineError
from pipeline.federation import app, node
from stages.report import read_runs, summary
from stages.train_fl.engines.flower import client, privacy, strategy
from stages.train_fl.evaluate import Classification
from stages.train_fl.methods import Scaffold, method_class
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.run import run
from stages.train_fl.session import Job
from tests.faults.test_disks import fill
from tests.federation.in_process import InProcess
from tests.train_fl import tiny_project
from tests.train_fl.method_fixtures import record_layouts

SAME = ("model.safetensors", "rounds.csv", "clients.csv", "partition.json")
SUPERVISED = (
    "fedavg", "fedprox", "scaffold", "fednova", "moon", "fednh", "fedcr", "feddyn", "fedavgm", "fedproto", "feddifrc",
    "fedprox-feddifrc",
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_nodes():
    """In a real federation every node is a separate process, which keeps nothing between messages."""
    client._build.cache_clear()
    yield
    client._build.cache_clear()


def deploy(project, monkeypatch, method="fedavg", partition="dir", server=None, changes=(), count=4, **node_config):
    """A federation of nodes on one project's data, each with its own part; `set` changes params.yaml."""
    values = {key: value for key, value in tiny_project.OVERRIDES.items() if not isinstance(value, dict | list)}
    values |= {"federation.min_clients": count, "federation.join_timeout": 20.0, **dict(changes)}
    monkeypatch.setattr(node, "PARAMS", project.root / "params.yaml")
    run_config = {
        "task": "train",
        "method": method,
        "partition": partition,
        "seed": 0,
        "project": str(server or project.root),
        "clients": "",
        "set": " ".join(f"{key}={value}" for key, value in values.items()) + " extract_features.dims=[6]",
    }
    nodes = {
        100 + k: {"client-id": k, "name": f"n{k}", "project": str(project.root), **node_config} for k in range(count)
    }
    return InProcess(run_config, nodes)


@pytest.fixture
def project(tmp_path):
    """A project whose params.yaml also has the tiny partitions, as the nodes of a federation need them."""
    made = tiny_project.make(tmp_path, partitions=tiny_project.OVERRIDES["partitions"] | {"nodes": {"kind": "nodes"}})
    write_partitions(tmp_path, made)
    tiny_project.add_features(made)
    return made


def write_partitions(root, made):
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe")
    values = yaml.load((root / "params.yaml").read_text())
    values["partitions"] = {name: part.model_dump() for name, part in made.params.partitions.items()}
    values["sweep"]["partitions"] = ["dir"]
    with (root / "params.yaml").open("w") as stream:
        yaml.dump(values, stream)


def rows(file):
    with file.open() as stream:
        return list(csv.DictReader(stream))


def outcomes(folder):
    return {(int(row["round"]), row["name"]): row["outcome"] for row in rows(folder / "participation.csv")}


@pytest.mark.parametrize("method", [*SUPERVISED, "feddifrc-ssl", "simsiam"])
def test_every_method_has_the_bytes_of_the_local_engine(project, tmp_path, monkeypatch, method):
    changes = {}
    if method == "simsiam":
        changes = {"train_fl.augmentation": "views"}
    if method == "feddifrc-ssl":
        changes = {"extract_features.prompts": "self-supervised"}
    overrides = {key.replace(".", "__"): value for key, value in changes.items()}
    local = tiny_project.make(tmp_path, partitions=tiny_project.OVERRIDES["partitions"], **overrides)
    write_partitions(tmp_path, project)
    if method == "feddifrc-ssl":
        shutil.rmtree(local.features_dir)
        tiny_project.add_features(local)
    expected = run(local, method, "dir", 0)
    kept = {name: (expected / name).read_bytes() for name in SAME}
    deploy(project, monkeypatch, method, changes=changes).serve()
    assert {name: (expected / name).read_bytes() for name in SAME} == kept
    assert (expected / "participation.csv").exists()


def test_a_client_draws_the_numbers_that_it_draws_under_the_local_engine(project, monkeypatch):
    """A method defined elsewhere may draw from torch's global generator."""
    drawn, client_update = {}, FedAvg.client_update

    def drawing(method, weights, broadcast, state, batches, learning_rate):
        drawn[len(batches.data)] = torch.rand(2).tolist()  # every client has another number of images
        return client_update(method, weights, broadcast, state, batches, learning_rate)

    monkeypatch.setattr(FedAvg, "client_update", drawing)
    changes = {"train_fl.num_rounds": 1, "train_fl.clients_per_round": 4, "runtime.workers": 1}
    overrides = {key.replace(".", "__"): value for key, value in changes.items()}
    run(tiny_project.make(project.root, **overrides), "fedavg", "dir", 0)
    write_partitions(project.root, project)
    local = drawn.copy()
    drawn.clear()
    deploy(project, monkeypatch, changes=changes).serve()
    assert drawn == local and len({tuple(numbers) for numbers in drawn.values()}) == 4


def result(project, method="fedavg", partition="dir"):
    return project.run_dir(method, partition, 0)


def all_take_part(project, monkeypatch, method="fedavg", changes=(), **more):
    everyone = {"train_fl.clients_per_round": 4, "train_fl.num_rounds": 3, **dict(changes)}
    return deploy(project, monkeypatch, method, changes=everyone, **more)


def of_round(message):
    return next(iter(message.content.config_records.values()))["number"]


def test_round_continues_without_a_killed_node(project, monkeypatch, capsys):
    federation = all_take_part(project, monkeypatch, count=4, changes={"federation.min_clients": 2})

    def kill(node_id, message):
        if node_id == 102 and message.metadata.message_type == "train" and of_round(message) == 2:
            federation.nodes.pop(102)

    federation.before = kill
    federation.serve()
    found = outcomes(result(project))
    assert {key: "trained" if value == "trained" else "not" for key, value in found.items()} == {
        **{(1, f"n{k}"): "trained" for k in range(4)},
        **{(2, f"n{k}"): "not" if k == 2 else "trained" for k in range(4)},
        **{(3, f"n{k}"): "trained" for k in (0, 1, 3)},
    }
    assert found[2, "n2"] == "no answer within 3600 s"
    said = capsys.readouterr().out
    assert "round 2 continues without client 2 (n2): no answer" in said
    assert "client 2 (n2) has left" in said
    assert "client 2 (n2): trained in 1 of 2 rounds; round 2: no answer within 3600 s" in said


def test_late_node_takes_part_after_its_introduction(project, monkeypatch):
    federation = all_take_part(
        project, monkeypatch, count=4, changes={"federation.min_clients": 3, "federation.join_timeout": 1.0}
    )
    late = federation.nodes.pop(103)

    def arrive(node_id, message):
        if message.metadata.message_type == "train" and of_round(message) == 1:
            federation.nodes[103] = late  # asked when round 2 begins, heard when round 3 does: no round waits

    federation.before = arrive
    federation.serve()
    assert [key for key in outcomes(result(project)) if key[1] == "n3"] == [(3, "n3")]


@pytest.mark.parametrize("method", ["scaffold", "moon", "feddyn"])
def test_client_state_survives_a_restart_of_its_node(project, monkeypatch, method):
    all_take_part(project, monkeypatch, method).serve()
    undisturbed = (result(project, method) / "model.safetensors").read_bytes()
    federation = all_take_part(project, monkeypatch, method)

    def restart(node_id, reply):
        if node_id == 101 and reply.metadata.message_type == "train":
            federation.restart(101, 201)

    federation.after = restart
    federation.serve()
    assert (201, "train") in federation.log
    assert (result(project, method) / "model.safetensors").read_bytes() == undisturbed


def test_lost_reply_does_not_change_the_client_state(project, monkeypatch):
    federation = all_take_part(project, monkeypatch, "scaffold")
    orders, kept = [], []

    def listen(node_id, message):
        if node_id == 101 and message.metadata.message_type == "train":
            orders.append(message.content.config_records["request"])
        if node_id == 101 and message.metadata.message_type == "query.forget":
            kept.extend(sorted(file.name for file in project.state_dir.glob("federation/*/client-00001/*")))

    federation.before = listen
    federation.after = lambda node_id, reply: reply.content.array_records.clear() if (
        node_id == 101 and reply.metadata.message_type == "train" and len(orders) == 2
    ) else None  # fmt: skip
    federation.serve()
    assert [(order["number"], order["state-round"]) for order in orders] == [(1, 0), (2, 1), (3, 1)]
    assert outcomes(result(project, "scaffold"))[2, "n1"].startswith("invalid reply")
    # the request of round 3 names the state of round 1, so that of round 2 is removed then; at the end all are
    assert kept == [f"client-00001-round-0000{k}.safetensors" for k in (1, 3)]
    assert not list(project.state_dir.glob("federation/*/*"))


def test_nodes_train_in_the_layout_of_the_network(project, monkeypatch):
    seen = record_layouts(monkeypatch)
    changes = {"train_fl.num_rounds": 2, "train_fl.num_clients": 2}
    deploy(project, monkeypatch, "scaffold", changes=changes, count=2).serve()
    # the small CNN has three convolutions; before round 1, clients have no state
    assert seen == [([3, 3, 3, 0], [])] * 2 + [([3] * 4, [])] * 2


def test_lost_client_state_is_logged_and_initialised(project, monkeypatch, caplog):
    federation = all_take_part(project, monkeypatch, "scaffold")

    def lose(node_id, message):
        if message.metadata.message_type == "train" and of_round(message) == 2:
            for file in project.state_dir.glob("federation/*/client-00001/*"):
                file.unlink()

    federation.before = lose
    federation.serve()
    assert "has no usable state of round 1" in caplog.text


@pytest.mark.parametrize("method", ["scaffold", "fedavgm", "fedproto"])
def test_killed_server_resumes_with_identical_results(project, monkeypatch, method):
    all_take_part(project, monkeypatch, method).serve()
    files = ("model.safetensors", "rounds.csv")
    undisturbed = [(result(project, method) / name).read_bytes() for name in files]
    federation = all_take_part(project, monkeypatch, method)

    def die(node_id, message):
        if node_id == 102 and message.metadata.message_type == "train" and of_round(message) == 3:
            raise KeyboardInterrupt

    federation.before = die
    with pytest.raises(KeyboardInterrupt):
        federation.serve()
    again = all_take_part(project, monkeypatch, method)
    again.serve()
    assert [kind for _, kind in again.log].count("train") == 4  # the third round alone
    assert [(result(project, method) / name).read_bytes() for name in files] == undisturbed
    assert len(outcomes(result(project, method))) == 12


def test_round_without_replies_stops_the_run_which_can_be_resumed(project, monkeypatch):
    federation = all_take_part(project, monkeypatch)
    federation.after = lambda node_id, reply: reply.content.array_records.clear() if (
        reply.metadata.message_type == "train" and federation.log.count((node_id, "train")) == 2
    ) else None  # fmt: skip
    with pytest.raises(PipelineError, match=r"no node sent a valid update in round 2 \(client 0: invalid reply"):
        federation.serve()
    again = all_take_part(project, monkeypatch)
    again.serve()
    assert [kind for _, kind in again.log].count("train") == 8


def on_disk(project):
    """The replies that are on the disk, as the system's list of memory maps has them."""
    unnamed = f"{project.state_dir}/#"
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if unnamed in line]


def named(project):
    """The files that a kill would leave in the folder that the replies are written to."""
    return [file for file in project.state_dir.iterdir() if file.is_file()]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list memory maps")
@pytest.mark.parametrize(("method", "parts"), [("fedavg", 1), ("fednova", 2), ("scaffold", 2)])
def test_replies_are_on_the_disk_without_a_name_until_the_round_ends(project, monkeypatch, method, parts):
    federation, seen, names = all_take_part(project, monkeypatch, method), [], []
    kind = method_class(project.settings("methods", method))
    server_update, scores = kind.server_update, Classification.scores

    def aggregate(self, state, updates):
        seen.append(len(on_disk(project)))
        names.extend(named(project))
        return server_update(self, state, updates)

    def score(self, model):
        seen.append(len(on_disk(project)))
        return scores(self, model)

    monkeypatch.setattr(kind, "server_update", aggregate)
    monkeypatch.setattr(Classification, "scores", score)
    federation.after = spoil(no_samples)  # a reply that is rejected leaves nothing either
    federation.serve()
    tried = [3 * parts] * (parts - 1)  # the extras are tried before the update
    assert [number for number in seen if number] == [*tried, 3 * parts] * 3 and 0 in seen
    assert not names and not on_disk(project)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list memory maps")
@pytest.mark.parametrize("how", ["no valid update", "interrupted"])
def test_failed_round_leaves_no_replies(project, monkeypatch, how):
    federation = all_take_part(project, monkeypatch, "scaffold")

    def fail(self, state, updates):
        assert on_disk(project)
        raise KeyboardInterrupt if how == "interrupted" else ValueError

    monkeypatch.setattr(Scaffold, "server_update", fail)
    monkeypatch.setattr(app.log, "disabled", True)  # pytest would keep the error, and so the round's variables
    with pytest.raises(PipelineError if how == "no valid update" else KeyboardInterrupt) as raised:
        federation.serve()
    del raised  # it holds the round's variables
    gc.collect()
    assert not on_disk(project) and not named(project)


def test_full_disk_ends_the_run_with_one_error_and_loses_nothing(project, monkeypatch, disk, capsys):
    shutil.copytree(project.state_dir, disk, dirs_exist_ok=True)
    shutil.rmtree(project.state_dir)
    project.state_dir.symlink_to(disk)
    all_take_part(project, monkeypatch).serve()
    files = ("model.safetensors", "rounds.csv")
    undisturbed = [(result(project) / name).read_bytes() for name in files]
    federation, fillers = all_take_part(project, monkeypatch), []

    def fill_disk(node_id, message):
        if message.metadata.message_type == "train" and of_round(message) == 2 and not fillers:
            fillers.append(fill(disk, leave=0))

    federation.before = fill_disk
    with pytest.raises(PipelineError, match=r"\.pipeline cannot be written \(No space left on device\)\. Make room"):
        federation.serve()
    assert capsys.readouterr().out.count("Error: ") == 1
    fillers[0].unlink()
    again = all_take_part(project, monkeypatch)
    again.serve()
    assert [kind for _, kind in again.log].count("train") == 8  # the second and third round
    assert [(result(project) / name).read_bytes() for name in files] == undisturbed
    assert len(outcomes(result(project))) == 12


def spoil(change):
    def after(node_id, reply):
        if node_id == 101 and reply.metadata.message_type == "train":
            change(reply.content)

    return after


def nan(content):
    weights = content.array_records["weights"]
    name = next(iter(weights))
    array = np.array(weights[name].numpy())
    array.flat[0] = np.nan
    weights[name] = type(weights[name])(array)


def other_shape(content):
    weights = content.array_records["weights"]
    name = next(iter(weights))
    weights[name] = type(weights[name])(np.zeros(3, np.float32))


def other_names(content):
    content.array_records["weights"].popitem()


def no_samples(content):
    content.metric_records["result"]["num-samples"] = 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nan, "is not finite"),
        (other_shape, "another model"),
        (other_names, "another model"),
        (no_samples, "trained on 0 images"),
    ],
)
def test_invalid_update_is_skipped_by_name(project, monkeypatch, change, words):
    federation = all_take_part(project, monkeypatch, changes={"train_fl.num_rounds": 1})
    federation.after = spoil(change)
    federation.serve()
    found = outcomes(result(project))
    assert words in found.pop((1, "n1"))
    assert set(found.values()) == {"trained"}
    assert all(value.isfinite().all() for value in load_file(result(project) / "model.safetensors").values())


def own_project(root, name, **overrides):
    """A node's folder with its images and, if the server's settings require them, features."""
    (root / name).mkdir()
    made = tiny_project.make(root / name, **overrides)
    return made


def private(tmp_path, project, monkeypatch, method="feddifrc", changes=()):
    """Three nodes with their own images and features on a common basis; the server has neither."""
    settings = {
        "extract_features.basis": "data/basis.h5",
        "train_fl.num_clients": 3,
        "train_fl.clients_per_round": 3,
        "train_fl.num_rounds": 2,
    }
    server = tmp_path / "server"
    federation = deploy(project, monkeypatch, method, "nodes", server, settings | dict(changes), 3)
    (tmp_path / "server").mkdir()
    for k in range(3):
        own = own_project(tmp_path, f"node{k}", extract_features__basis="data/basis.h5")
        tiny_project.add_features(own, basis_images=None, basis_sha256="0" * 64)
        federation.nodes[100 + k] |= {"project": str(own.root)}
    return federation


def test_a_part_of_the_nodes_evaluates(tmp_path, project, monkeypatch):
    federation = private(tmp_path, project, monkeypatch, changes={"federation.evaluation_clients": 1})
    federation.serve()
    asked = [node_id for node_id, kind in federation.log if kind == "evaluate"]
    assert len(asked) == 2 and len(set(asked)) == 1  # the same one after both rounds
    folder = tmp_path / "server" / "results" / "feddifrc-nodes" / "s0"
    num_bytes = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    found = rows(folder / "rounds.csv")
    assert [(row["evaluation_clients"], row["evaluation_bytes"]) for row in found] == [("1", str(num_bytes))] * 2
    down = sum(int(row["bytes_down"]) for row in found)
    assert json.loads((folder / "details.json").read_text())["bytes_down"] == down + 2 * num_bytes


def test_a_node_that_does_not_answer_is_not_waited_for_twice_in_a_round(tmp_path, project, monkeypatch):
    changes = {"federation.min_clients": 1, "train_fl.clients_per_round": 3}
    federation = private(tmp_path, project, monkeypatch, changes=changes)
    federation.silent |= {(101, "train")}
    federation.serve()
    asked = [(node_id, kind) for node_id, kind in federation.log if kind in ("train", "evaluate")]
    assert asked.count((101, "train")) == 2  # slow nodes are included again in the next round
    assert asked.count((101, "evaluate")) == 0 and asked.count((100, "evaluate")) == 2


def test_nodes_with_private_images_train_and_evaluate_together(tmp_path, project, monkeypatch):
    federation = private(tmp_path, project, monkeypatch)
    federation.serve()
    folder = tmp_path / "server" / "results" / "feddifrc-nodes" / "s0"
    assert (federation.log.count((100, "evaluate")), federation.log.count((100, "train"))) == (2, 2)
    assert {row["num_samples"] for row in rows(folder / "participation.csv")} == {"48"}
    # all three have the same 24 test images, so their mean is any one's
    weights = load_file(folder / "model.safetensors")
    participant = client._build(
        node.Node(0, "n0", tmp_path / "node0", None), tuple(sorted(federation.run_config.items()))
    )
    participant.model.load_state_dict(weights)
    accuracy = Classification(participant.data.held_out).scores(participant.model)["accuracy"]
    assert float(rows(folder / "rounds.csv")[-1]["accuracy"]) == pytest.approx(accuracy, abs=1e-12)
    assert json.loads((folder / "metrics.json").read_text())["final_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert not (tmp_path / "server" / "data").exists()
    (found,) = read_runs(folder.parents[1])
    assert (found.class_names, found.clients, found.label_counts.size) == (tiny_project.CLASSES, [], 0)
    assert "2 rounds)" in repr(found) and summary([found]).rows[0]["num_seeds"] == 1


def test_nodes_with_foreign_or_damaged_features_are_rejected_by_name(tmp_path, project, monkeypatch, capsys):
    federation = private(
        tmp_path, project, monkeypatch, changes={"federation.min_clients": 1, "federation.join_timeout": 1.0}
    )
    manifest = next((tmp_path / "node1" / "data" / "features").glob("*/manifest.json"))
    manifest.write_text(manifest.read_text().replace('"timestep": 300', '"timestep": 200'))
    shard = next((tmp_path / "node2" / "data" / "features").glob("*/shard-00000.h5"))
    with h5py.File(shard) as h5:
        offset = h5["denoised"].id.get_offset()
    content = bytearray(shard.read_bytes())
    content[offset] ^= 1
    shard.write_bytes(content)
    federation.serve()
    said = capsys.readouterr().out
    assert "rejected: client 1 (n1): " in said and str(tmp_path / "node1") in said
    assert "rejected: client 2 (n2): " in said and "shard-00000.h5" in said
    assert {name for _, name in outcomes(tmp_path / "server" / "results" / "feddifrc-nodes" / "s0")} == {"n0"}


def test_features_of_different_bases_or_models_are_not_mixed(tmp_path, project, monkeypatch, capsys):
    federation = private(
        tmp_path, project, monkeypatch, changes={"federation.min_clients": 2, "federation.join_timeout": 1.0}
    )
    other = tiny_project.make(tmp_path / "node2", extract_features__basis="data/basis.h5")
    shutil.rmtree(other.features_dir)
    tiny_project.add_features(other, basis_images=None, basis_sha256="1" * 64)
    federation.serve()
    said = capsys.readouterr().out
    assert "rejected: client 2 (n2) has {'features.basis_sha256': '1111" in said


def test_features_on_a_private_basis_are_rejected_with_the_remedy(tmp_path, project, monkeypatch):
    changes = {"federation.join_timeout": 0.5}
    federation = deploy(project, monkeypatch, "feddifrc", "nodes", tmp_path / "server", changes, count=1)
    (tmp_path / "server").mkdir()
    with pytest.raises(PipelineError, match=r"rejected: client 0 \(n0\): .*PCA basis of the node\'s own images.*task="):
        federation.serve()


@pytest.mark.parametrize(
    ("node_config", "words"),
    [
        ({"client-id": 1}, "has the client-id of n1"),
        ({"client-id": "x"}, "no client-id"),
        ({"client-id": 9}, r"client-id 9 is too high \(partitions.dir has 4 clients\)"),
        ({"name": "\x1b[2Jtwo\nlines", "client-id": 9}, r"client 9 \(\\x1b\[2Jtwo lines\)"),
        ({"project": "/nowhere"}, "does not exist"),
        ({"threads": 0}, r"threads=0 in --node-config is invalid\. Use an integer, 1 or more"),
    ],
)
def test_wrong_node_config_is_rejected(project, monkeypatch, node_config, words):
    federation = all_take_part(project, monkeypatch, changes={"federation.join_timeout": 0.5})
    federation.nodes[103] |= node_config
    with pytest.raises(PipelineError, match=words):
        federation.serve()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("task", "tarin", "Use one of train, basis"),
        ("method", "fedagv", "params.yaml has no methods.fedagv"),
        ("set", "train_fl.num_rounds", "is not an assignment"),
        ("project", "/nowhere", "does not exist on the server"),
    ],
)
def test_invalid_run_config_is_reported_on_one_line(project, monkeypatch, key, value, words):
    federation = all_take_part(project, monkeypatch)
    federation.run_config[key] = value
    with pytest.raises(PipelineError, match=words):
        federation.serve()


def state(project, method="fedavg"):
    return load_file(result(project, method) / "model.safetensors")


def initial(project, monkeypatch):
    """The initial weights."""
    federation = all_take_part(project, monkeypatch)
    participant = client._build(node.Node(0, "n0", project.root, None), tuple(sorted(federation.run_config.items())))
    client._build.cache_clear()
    return {name: value.clone() for name, value in participant.model.state_dict().items()}


def updates_of_one_round(project, monkeypatch):
    """Each client's weights after round 1, as sent without noise."""
    federation, sent = all_take_part(project, monkeypatch, changes={"train_fl.num_rounds": 1}), {}

    def listen(node_id, reply):
        if reply.metadata.message_type == "train":
            arrays = reply.content.array_records["weights"]
            sent[node_id] = {name: torch.from_numpy(np.array(a.numpy())) for name, a in arrays.items()}

    federation.after = listen
    federation.serve()
    return sent


def clipped_mean(start, updates, norm):
    """By loops: x + 1/S sum_k u_k min(1, norm / |u_k|) with u_k = w_k - x."""
    mean = {name: value.double().clone() for name, value in start.items()}
    for weights in updates.values():
        update = {name: weights[name].double() - start[name].double() for name in start}
        length = float(sum((value**2).sum() for value in update.values())) ** 0.5
        assert length > norm  # else nothing is clipped and the test shows nothing
        for name in mean:
            mean[name] += update[name] * (norm / length) / len(updates)
    return mean


@pytest.mark.parametrize(
    "privacy",
    [
        "{kind: central, clipping_norm: 0.01, noise_multiplier: 1.0e-9}",
        "{kind: local, clipping_norm: 0.01, epsilon: 1.0e+9, delta: 0.1}",
    ],
)
def test_differential_privacy_clips_updates_and_weights_them_equally(project, monkeypatch, privacy):
    start, updates = initial(project, monkeypatch), updates_of_one_round(project, monkeypatch)
    protected = {"train_fl.num_rounds": 1, "federation.differential_privacy": f"'{privacy}'", "sweep.seeds": "[0]"}
    federation = all_take_part(
        project, monkeypatch, "fedprox", changes={**protected, "methods.fedprox.proximal_mu": 0.0}
    )
    federation.serve()
    expected = clipped_mean(start, updates, 0.01)
    for name, value in state(project, "fedprox").items():
        torch.testing.assert_close(value.double(), expected[name], atol=2e-6, rtol=0)


def test_central_noise_is_scaled_to_the_number_of_replies(project, monkeypatch):
    start = initial(project, monkeypatch)
    asked = "'{kind: central, clipping_norm: 1.0e-6, noise_multiplier: 1000.0}'"
    protected = {"train_fl.num_rounds": 1, "federation.differential_privacy": asked}
    federation = all_take_part(project, monkeypatch, changes={**protected, "federation.min_clients": 2})
    federation.after = spoil(no_samples)
    federation.serve()
    noise = torch.cat([(value - start[name]).flatten() for name, value in state(project).items()])
    # multiplier * norm / (three who answered); ten thousands of weights: a deviation of it within a few percent
    assert noise.std().item() == pytest.approx(1000 * 1e-6 / 3, rel=0.05)


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("scaffold", {}, "methods.scaffold sends or keeps more"),
        ("fedavg", {"train_fl.model": "resnet10"}, "train_fl.normalisation to group"),
    ],
)
def test_differential_privacy_must_cover_everything_sent(project, monkeypatch, method, changes, words):
    private = {"federation.differential_privacy": "'{kind: local, clipping_norm: 1.0, epsilon: 1.0, delta: 0.1}'"}
    with pytest.raises(PipelineError, match=words):
        all_take_part(project, monkeypatch, method, changes=private | changes).serve()


def first(content, change):
    """Change the first array that a method sends besides weights."""
    extras = content.array_records["extras"]
    name = next(iter(extras))
    extras[name] = type(extras[name])(change(np.array(extras[name].numpy())))


OTHER_FORM = "differ from those of the other clients"


@pytest.mark.parametrize("method", ["scaffold", "fedproto", "fednh", "fedcr", "fednova"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.array_records.pop("extras"), OTHER_FORM),
        (lambda content: first(content, lambda array: np.zeros((7, 1, 5), np.float32)), OTHER_FORM),
        (lambda content: content.metric_records["result"].__setitem__("loss:other", 1.0), OTHER_FORM),
        (lambda content: content.metric_records["result"].__setitem__("num-samples", 10**9), "but joined with"),
    ],
    ids=["missing", "shape", "losses", "amount"],
)
def test_extras_of_a_method_are_checked(project, monkeypatch, method, change, words):
    federation = all_take_part(project, monkeypatch, method, changes={"train_fl.num_rounds": 1})
    federation.after = spoil(change)
    federation.serve()
    found = outcomes(result(project, method))
    assert words in found.pop((1, "n1"))
    assert set(found.values()) == {"trained"}


def test_extras_that_would_fill_the_disk_are_rejected(project, monkeypatch):
    monkeypatch.setattr(strategy, "_LEAST_EXTRAS", 0)  # four times the model are the most
    federation = all_take_part(project, monkeypatch, "scaffold", changes={"train_fl.num_rounds": 1})
    federation.after = spoil(lambda content: first(content, lambda array: np.zeros(10**7, np.float32)))
    federation.serve()
    assert "it has extras of 40.7 MB, and " in outcomes(result(project, "scaffold")).pop((1, "n1"))


def test_unreadable_arrays_are_skipped_by_name(project, monkeypatch):
    def no_array(content):
        array = next(iter(content.array_records["weights"].values()))
        array.data = b"PK"

    federation = all_take_part(project, monkeypatch, changes={"train_fl.num_rounds": 1})
    federation.after = spoil(no_array)
    federation.serve()
    assert outcomes(result(project)).pop((1, "n1")).startswith("invalid reply")


@pytest.mark.parametrize("scores", [{}, {"accuracy": 77.0}, {"loss": float("nan")}, {"num-images": 0}])
def test_invalid_scores_are_skipped_by_name(tmp_path, project, monkeypatch, capsys, scores):
    federation = private(tmp_path, project, monkeypatch, changes={"train_fl.num_rounds": 1})

    def lie(node_id, reply):
        if node_id == 101 and reply.metadata.message_type == "evaluate":
            record = reply.content.metric_records["scores"]
            record.update(scores) if scores else record.clear()

    federation.after = lie
    federation.serve()
    said = capsys.readouterr().out
    assert "continuing evaluate without client 1 (n1): invalid scores" in said
    accuracy = float(rows(tmp_path / "server" / "results" / "feddifrc-nodes" / "s0" / "rounds.csv")[0]["accuracy"])
    assert 0 <= accuracy <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"client-id": 99}, "invalid client-id. It must be from 0 to 3"),
        ({"num-samples": 0}, "0 images"),
        ({"agreement": "[" * 10**5}, "invalid introduction"),
    ],
)
def test_invalid_introduction_is_rejected(project, monkeypatch, capsys, change, words):
    changes = {"federation.min_clients": 3, "federation.join_timeout": 1.0, "train_fl.num_rounds": 1}
    federation = all_take_part(project, monkeypatch, changes=changes)
    federation.after = lambda node_id, reply: reply.content.config_records["introduction"].update(change) if (
        node_id == 101 and reply.metadata.message_type == "query.join"
    ) else None  # fmt: skip
    federation.serve()
    assert words in capsys.readouterr().out
    assert {name for _, name in outcomes(result(project))} == {"n0", "n2", "n3"}


def test_run_starts_after_all_nodes_have_joined(project, monkeypatch):
    federation = all_take_part(project, monkeypatch, changes={"federation.min_clients": 1, "train_fl.num_rounds": 1})
    late, seen = federation.nodes.pop(103), []

    def ids():
        seen.append(1)
        if len(seen) == 3:
            federation.nodes[103] = late
        return list(federation.nodes)

    federation.get_node_ids = ids
    federation.serve()
    assert {name for _, name in outcomes(result(project))} == {"n0", "n1", "n2", "n3"}


def test_nodes_whose_requests_were_not_stored_are_asked_again(project, monkeypatch):
    federation = all_take_part(project, monkeypatch, changes={"train_fl.num_rounds": 1})
    push, calls = federation.push_messages, []

    def lossy(messages):
        """Omit the id of one request, and give "" for another."""
        calls.append(messages)
        return push(messages) if len(calls) > 1 else ["", *push(messages[2:])]

    federation.push_messages = lossy
    federation.serve()
    assert {name for _, name in outcomes(result(project))} == {"n0", "n1", "n2", "n3"}


def test_run_that_is_being_written_asks_no_nodes(project, monkeypatch):
    federation = all_take_part(project, monkeypatch)
    with Job(project, "fedavg", "dir", 0).locked(), pytest.raises(PipelineError, match="is being written by process"):
        federation.serve()
    assert federation.log == []


def test_node_name_with_special_characters_is_accepted(project, monkeypatch):
    federation = all_take_part(project, monkeypatch, changes={"train_fl.num_rounds": 1})
    federation.nodes[101]["name"] = r"site $\bad$"
    federation.serve()
    assert "SHA256SUMS" in {file.name for file in result(project).iterdir()}


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-5), (8.0, 1e-3), (10.0, 1e-5), (50.0, 1e-5)])
def test_local_noise_is_private_for_every_epsilon(epsilon, delta):
    from scipy.stats import norm

    deviation = privacy.gaussian_deviation(2.0, epsilon, delta)
    thresholds = np.linspace(-60, 60, 2_000_001) * deviation
    # by the definition: the worst event of two outcomes at distance 2 is a half line
    worst = (norm.sf(thresholds, 2.0, deviation) - np.exp(epsilon) * norm.sf(thresholds, 0.0, deviation)).max()
    assert worst == pytest.approx(delta, rel=1e-3)


def test_local_noise_is_in_the_update_that_a_node_sends(project, monkeypatch):
    start = initial(project, monkeypatch)
    asked = "'{kind: local, clipping_norm: 1.0e-6, epsilon: 1.0, delta: 0.00001}'"
    protected = {"train_fl.num_rounds": 1, "federation.differential_privacy": asked}
    federation, sent = all_take_part(project, monkeypatch, changes=protected), {}

    def listen(node_id, reply):
        if reply.metadata.message_type == "train":
            arrays = reply.content.array_records["weights"]
            sent[node_id] = torch.cat([torch.from_numpy(np.array(arrays[name].numpy())).flatten() for name in start])

    federation.after = listen
    federation.serve()
    origin = torch.cat([value.flatten() for value in start.values()])
    for weights in sent.values():
        deviation = (weights.double() - origin.double()).std().item()
        assert deviation == pytest.approx(privacy.gaussian_deviation(2e-6, 1.0, 1e-5), rel=0.05)


def test_engines_do_not_resume_from_each_others_checkpoints(project, monkeypatch):
    federation = all_take_part(project, monkeypatch, "scaffold")

    def die(node_id, message):
        if message.metadata.message_type == "train" and of_round(message) == 3:
            raise KeyboardInterrupt

    federation.before = die
    with pytest.raises(KeyboardInterrupt):
        federation.serve()
    changes = {"train_fl__clients_per_round": 4, "train_fl__num_rounds": 3}
    same = tiny_project.make(project.root, partitions=tiny_project.OVERRIDES["partitions"], **changes)
    write_partitions(project.root, project)
    expected = run(same, "scaffold", "dir", 0, overwrite=True)
    kept = (expected / "model.safetensors").read_bytes()
    all_take_part(project, monkeypatch, "scaffold").serve()
    assert (expected / "model.safetensors").read_bytes() == kept


@pytest.mark.parametrize(("key", "value", "words"), [("seed", "x", "Use an integer"), ("set", "a='b", "cannot parse")])
def test_unreadable_run_config_is_reported_on_one_line(project, monkeypatch, key, value, words):
    federation = all_take_part(project, monkeypatch)
    federation.run_config[key] = value
    with pytest.raises(PipelineError, match=words):
        federation.serve()
