"""Training without labels: the loss by hand, independence of labels, the probes."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from pipeline.data import datasets
from pipeline.errors import PipelineError
from stages.train_fl import run
from stages.train_fl.client_data import ClientData
from stages.train_fl.data import HeldOut
from stages.train_fl.methods.self_supervised import simsiam_loss
from stages.train_fl.probes import Probes, vote_shares
from tests.train_fl import tiny_project

ROUND = {"train_fl__num_rounds": 1, "train_fl__augmentation": "views"}


def test_simsiam_loss_by_hand():
    # angles: p1 to v2 60 degrees, p2 to v1 90 degrees -> -(0.5 + 0) / 2
    v1, p1 = torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 0.0]], requires_grad=True)
    v2 = torch.tensor([[0.5, math.sqrt(3) / 2]], requires_grad=True)
    p2 = torch.tensor([[1.0, 0.0]])
    loss = simsiam_loss(v1, p1, v2, p2)
    assert loss.item() == pytest.approx(-0.25)
    loss.backward()
    assert v2.grad is None and p1.grad is not None  # projections receive no gradient


@pytest.mark.parametrize("method", ["simsiam", "feddifrc-ssl"])
def test_a_run_reports_both_probes(tmp_path, method):
    project = tiny_project.make(tmp_path, extract_features__prompts="self-supervised", **ROUND)
    tiny_project.add_features(project)
    metrics = json.loads((run(project, method, "iid", 0) / "metrics.json").read_text())
    assert metrics["final_accuracy"] == metrics["knn_accuracy"]
    assert 0 <= metrics["linear_probe_accuracy"] <= 1


def test_features_with_class_prompts_are_rejected_without_labels(tmp_path):
    project = tiny_project.make(tmp_path, **ROUND)
    tiny_project.add_features(project)
    with pytest.raises(PipelineError, match="prompts that name each image's class"):
        run(project, "feddifrc-ssl", "iid", 0)


def test_simsiam_reads_no_label(tmp_path):
    weights = []
    for name in ("a", "b"):
        root = tmp_path / name
        root.mkdir()
        project = tiny_project.make(root, **ROUND)
        if name == "b":  # the same images, other labels
            splits = {"train": tiny_project.images(48, 0), "test": tiny_project.images(24, 1)}
            splits["train"].labels[:] = splits["train"].labels[::-1].copy()
            source = datasets.Source(tiny_project.CLASSES, splits, "none", ["left", "right"])
            datasets.write(project.dataset_dir, "tiny", "test", source)
        weights.append(load_file(run(project, "simsiam", "iid", 0) / "model.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_simsiam_without_augmentation_is_rejected(tmp_path):
    with pytest.raises(PipelineError, match="two views of each image"):
        run(tiny_project.make(tmp_path), "simsiam", "iid", 0)


class Identity(torch.nn.Module):
    def embed(self, images):
        return images[:, :2, 0, 0]


def test_probes_classify_separable_embeddings():
    # two classes by the sign of the first pixel
    labels = torch.arange(40) % 2
    images = torch.randint(0, 100, (40, 3, 1, 1), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[:, 0, 0, 0] += 150 * labels.to(torch.uint8)
    data = ClientData(images, labels)
    probes = Probes([data, ClientData(images[:0], labels[:0])], HeldOut(images, labels, labels * 0), 1)
    scores = probes.scores(Identity())
    assert scores["accuracy"] == 1.0 and scores["loss"] == pytest.approx(0)
    predict, accuracies = probes.final(Identity())
    assert accuracies == {"linear_probe_accuracy": 1.0, "knn_accuracy": 1.0}
    assert np.array_equal(predict(images).numpy(), labels.numpy())


def test_vote_shares_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    train, queries = (nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (40, 12))
    queries[0] = train[3]  # at distance 0, it alone votes
    train[3], queries[0] = torch.eye(5)[0], torch.eye(5)[0]
    labels = torch.randint(3, (40,), generator=generator)
    knn = KNeighborsClassifier(7, metric="cosine", weights="distance").fit(train.double().numpy(), labels)
    votes = nn.functional.one_hot(labels).double()
    found = vote_shares(train.double(), votes, queries.double(), 7)
    assert np.allclose(found, knn.predict_proba(queries.double().numpy()), atol=1e-6)
    assert found[0, labels[3]] == 1
