"""Federated PCA: the basis of all nodes' images equals that of the pooled images to 1e-10."""

import json

import numpy as np
import pytest
import torch

from pipeline import feature_store
from pipeline.data.datasets import PreparedDataset
from pipeline.diffusion.representation import Moments, Projector, fit_basis
from pipeline.errors import PipelineError
from pipeline.federation import node
from pipeline.settings import config
from stages.extract_features import basis as pca
from stages.extract_features import plan as planning
from stages.extract_features.federated import moments
from stages.extract_features.run import load
from stages.train_fl.engines.flower import client as training
from tests.conftest import invoke, write_params
from tests.federation.in_process import InProcess

IMAGES = (14, 11, 12)  # of the three nodes; the basis is of at most 12 of each
SETTINGS = {
    "extract_features.basis": "data/basis.h5",
    "extract_features.basis_images": 12,
    "extract_features.negatives": 2,
    "train_fl.num_clients": 3,
    "train_fl.clients_per_round": 3,
    "federation.min_clients": 2,
    "federation.join_timeout": 60.0,
}


@pytest.fixture(scope="module")
def projects(tmp_path_factory):
    """Folders of three nodes with images and the frozen model but no basis, and an empty folder of the server."""
    root = tmp_path_factory.mktemp("federation")
    (root / "server").mkdir()
    made = []
    for number, count in enumerate(IMAGES):
        project = root / f"node{number}"
        project.mkdir()
        write_params(project, SETTINGS | {"prepare_data.train_subset": count, "prepare_data.seed": number})
        for command in ("prepare-data", "prepare-backbone"):
            done = invoke(project, command)
            assert done.exit_code == 0, done.output
        made.append(project)
    return made


def deploy(projects, monkeypatch, task="basis", **changes):
    monkeypatch.setattr(node, "PARAMS", projects[0] / "params.yaml")
    values = " ".join(f"{key.replace('__', '.')}={value}" for key, value in changes.items())
    run_config = {
        "task": task, "method": "feddifrc", "partition": "nodes", "seed": 0, "clients": "", "set": values,
        "project": str(projects[0].parent / "server"),
    }  # fmt: skip
    return InProcess(
        run_config, {7 + k: {"client-id": k, "name": f"n{k}", "project": str(p)} for k, p in enumerate(projects)}
    )


def centralised(projects):
    """PCA of the pooled images by NumPy, and mean and deviation of their projections."""
    vectors, maps = {}, []
    for project in projects:
        made = config.load(project / "params.yaml", {"extract_features.basis": "auto"})
        job = planning.make(made)
        extraction = load(job)
        index = pca.images(job.feature_set.rows, 12, made.params.extract_features.noise_seed)
        assert len(index) == min(12, len(PreparedDataset(made.dataset_dir).load("train")))
        inputs = extraction.clean_inputs(index)
        text = torch.full((len(index),), extraction.session.model.generic)
        batches = extraction.session.batcher.map(
            lambda r, i=inputs, t=text, e=extraction: e.maps(i, r, t[r]), len(index)
        )
        parts = [{name: own[: rows.stop - rows.start] for name, own in found.items()} for rows, found in batches]
        maps.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        for layer, own in maps[-1].items():
            vectors.setdefault(layer, []).append(own.permute(0, 2, 3, 1).flatten(0, 2).double().numpy())
    result = {}
    for layer, parts in vectors.items():
        rows = np.concatenate(parts)
        variance, axes = np.linalg.eigh(np.cov(rows.T))
        result[layer] = (rows.mean(0), variance[::-1], axes[:, ::-1].T)
    return result, maps


def test_federated_basis_equals_the_pooled_basis_and_training_uses_it(projects, monkeypatch, capsys):
    deploy(projects, monkeypatch).serve()
    file = projects[0].parent / "server" / "data" / "basis.h5"
    expected, maps = centralised(projects)
    basis = feature_store.read_basis_file(file, list(expected))
    for layer, (mean, variance, axes) in expected.items():
        found = basis.layers[layer]
        np.testing.assert_allclose(found.mean, mean, rtol=0, atol=1e-10)
        np.testing.assert_allclose(found.explained_variance, variance[: len(found.components)], rtol=0, atol=1e-10)
        for own, axis, value in zip(found.components, axes, variance, strict=False):
            if value > 1e-6 * variance[0]:  # below, axes are not determined to this precision
                assert abs(abs(own @ axis) - 1) < 1e-10
    projector = Projector(basis.layers, "cpu")
    pooled = np.concatenate([projector(own).double().numpy() for own in maps])
    np.testing.assert_allclose(basis.mean, pooled.mean(0), rtol=0, atol=1e-5)  # float32 products of another shape
    np.testing.assert_allclose(basis.std, pooled.std(0), rtol=0, atol=1e-5)
    account = json.loads(file.with_suffix(".json").read_text())
    assert [(row["name"], row["images"]) for row in account["members"]] == [("n0", 12), ("n1", 11), ("n2", 12)]
    commons = []
    for project in projects:
        assert (project / "data" / "basis.h5").read_bytes() == file.read_bytes()
        done = invoke(project, "extract-features")
        assert done.exit_code == 0, done.output
        made = config.load(project / "params.yaml")
        commons.append(feature_store.FeatureSet(made.features_dir).manifest.content.common())
    assert commons[0] == commons[1] == commons[2]
    training._build.cache_clear()
    deploy(projects, monkeypatch, "train", train_fl__num_rounds=1).serve()
    assert "client 2 (n2): trained in 1 of 1 rounds" in capsys.readouterr().out


def test_failing_node_is_skipped_by_name(projects, monkeypatch, capsys):
    federation = deploy(projects, monkeypatch)
    federation.silent.add((8, "query.moments"))
    federation.serve()
    assert "without client 1 (n1): no answer" in capsys.readouterr().out
    account = json.loads((projects[0].parent / "server" / "data" / "basis.json").read_text())
    assert [row["name"] for row in account["members"]] == ["n0", "n2"]
    federation = deploy(projects, monkeypatch, federation__min_clients=3)
    federation.silent.add((8, "query.moments"))
    with pytest.raises(PipelineError, match=r"too few nodes are left .2, federation.min_clients is 3"):
        federation.serve()


def test_node_with_another_frozen_model_is_rejected_by_name(projects, monkeypatch, capsys):
    manifest = projects[1] / "data" / "backbones" / "tiny-sd.json"
    kept = manifest.read_text()
    files = json.loads(kept)["files"]
    manifest.write_text(kept.replace(files["unet/config.json"], "0" * 64))
    federation = deploy(projects, monkeypatch, federation__join_timeout=1.0)
    federation.serve()
    manifest.write_text(kept)
    said = capsys.readouterr().out
    assert "rejected: client 1 (n1): " in said and "unet/config.json differs" in said


def test_basis_without_a_file_is_rejected(projects, monkeypatch):
    with pytest.raises(PipelineError, match="extract_features.basis is auto. Set it to a file"):
        deploy(projects, monkeypatch, extract_features__basis="auto").serve()


def test_merged_moments_equal_pooled_moments_far_from_zero():
    rng = np.random.default_rng(0)
    maps = torch.from_numpy(rng.normal(1e4, 1, (9, 5, 3, 3)))  # sums of squares would lose eight digits here
    pooled = Moments(5)
    pooled.update(maps)
    parts = []
    for part in maps.split([4, 2, 3]):
        own = Moments(5)
        own.update(part)
        parts.append(moments.read_moments(moments.pack_moments({"up_blocks.1": own}), {"up_blocks.1": 5}))
    total = moments.add_moments(parts)["up_blocks.1"]
    assert total.count == 81
    found, expected = fit_basis(total, 5), fit_basis(pooled, 5)
    np.testing.assert_allclose(found.explained_variance, expected.explained_variance, rtol=1e-10)
    np.testing.assert_allclose(found.components, expected.components, atol=1e-10)


@pytest.mark.parametrize("spoil", ["nan", "shape", "missing", "count"])
def test_invalid_moments_are_rejected(spoil):
    own = Moments(3)
    own.update(torch.randn(2, 3, 2, 2))
    if spoil == "nan":
        own.scatter[0, 0] = float("nan")
    if spoil == "count":
        own.count = 0
    content = moments.pack_moments({"a": own})
    channels = {"a": 4} if spoil == "shape" else {"b": 3} if spoil == "missing" else {"a": 3}
    with pytest.raises(PipelineError, match="invalid moments"):
        moments.read_moments(content, channels)
