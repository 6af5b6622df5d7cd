"""Training from arrays in memory, without params.yaml."""

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from pipeline.data.datasets import PreparedDataset
from pipeline.errors import ConfigError, DataError, FeatureSetError
from pipeline.feature_store import FeatureSet
from stages.train_fl import Samples, run, simulate, simulation
from stages.train_fl.methods import FedAvg, FedDifRC, Method, SelfSupervisedFedDifRC, SimSiam
from stages.train_fl.models import GaussianBottleneck
from tests.conftest import REPOSITORY
from tests.train_fl import tiny_project
from tests.train_fl.test_run import rows

SHORT = {"num_rounds": 2, "local_epochs": 1, "batch_size": 8, "clients_per_round": 2}


def samples(count: int, seed: int) -> Samples:
    made = tiny_project.images(count, seed)
    return Samples(made.images, made.labels)


class Halved(FedAvg):
    """A method as a user writes it: the server keeps half of the old weights."""

    def server_update(self, state, updates):
        new, metrics = super().server_update(state, updates)
        mixed = {
            name: torch.lerp(value.float(), new.weights[name].float(), 0.5) for name, value in state.weights.items()
        }
        return type(new)(mixed), metrics


class Narrow(FedAvg):
    """A method with another network."""

    @classmethod
    def model_parts(cls, settings):
        return {"latent_dim": 7}


class WithoutLabels(FedAvg):
    """A method without labels, whose evaluation is not configured."""

    needs_labels = False


def test_defaults_are_those_of_params_yaml():
    train_fl = YAML(typ="safe").load((REPOSITORY / "params.yaml").read_text())["train_fl"]
    assert simulation.DEFAULTS == {key: train_fl[key] for key in simulation.DEFAULTS}


def test_simulation_has_the_results_of_a_run_with_the_same_clients(tmp_path):
    project = tiny_project.make(tmp_path)
    tiny_project.add_features(project)
    folder = run(project, "feddifrc", "dir", 0)
    dataset, features = PreparedDataset(project.dataset_dir), FeatureSet(project.features_dir)
    train, test = dataset.load("train"), dataset.load("test")
    import json

    parts = json.loads((folder / "partition.json").read_text())["clients"]
    clients = [Samples(train.images[part], train.labels[part], features, part) for part in parts]
    settings = {**SHORT, "num_rounds": 4}
    history = simulate(
        project.params.methods["feddifrc"], clients, Samples(test.images, test.labels), device="cpu", **settings
    )
    assert [str(row["accuracy"]) for row in history.rows] == [row["accuracy"] for row in rows(folder / "rounds.csv")]
    assert str(history).splitlines()[0].split()[:3] == ["round", "accuracy", "loss"]


def test_custom_method_trains():
    clients = [samples(12, k) for k in range(3)]
    plain = simulate(FedAvg, clients, samples(9, 9), device="cpu", **SHORT)
    own = simulate(Halved, clients, samples(9, 9), device="cpu", **SHORT)
    assert len(own.rows) == 2 and own.rows[0]["loss"] != plain.rows[0]["loss"]
    assert own.rows[0]["train_cross_entropy"] == plain.rows[0]["train_cross_entropy"]


def test_custom_method_has_the_network_that_it_needs():
    history = simulate(Narrow, [samples(12, 0)], samples(9, 9), device="cpu", **SHORT)
    assert isinstance(history.model.bottleneck, GaussianBottleneck) and history.model.embedding_dim == 7


def test_float_and_grey_images_are_accepted():
    grey = np.random.default_rng(0).random((6, 8, 8))
    pixels = simulation._pixels(grey)
    assert pixels.shape == (6, 3, 8, 8) and pixels.dtype == torch.uint8
    assert np.array_equal(pixels[:, 0].numpy(), np.round(255 * grey)) and torch.equal(pixels[:, 0], pixels[:, 2])


@pytest.mark.parametrize(
    ("client", "settings", "error", "words"),
    [
        (samples(6, 0), {"num_round": 3}, ConfigError, "unknown setting num_round"),
        (samples(6, 0), {"learning_rate": -1.0}, ConfigError, "invalid setting learning_rate"),
        (Samples(np.zeros((4, 8, 8, 3), np.uint8), [0, 1]), {}, DataError, "Pass 4 integers"),
        (Samples(np.full((2, 8, 8), 16.0), [0, 1]), {}, DataError, "float images are not from 0 to 1"),
        (Samples(np.zeros((2, 8), np.uint8), [0, 1]), {}, DataError, "images have shape"),
        (Samples(np.zeros((2, 8, 8), np.uint8), [0.0, 1.9]), {}, DataError, "labels do not fit the images"),
        (Samples(np.zeros((2, 8, 8), np.uint8), None), {}, DataError, "labels do not fit the images"),
        (samples(0, 0), {}, DataError, "^clients have no images"),
        (samples(6, 0), {"device": "gpu"}, ConfigError, "^device = gpu is not a device"),
    ],
)
def test_invalid_arguments_are_reported(client, settings, error, words):
    with pytest.raises(error, match=words):
        simulate(FedAvg, [client], samples(6, 1), **{"device": "cpu", **settings})


def test_held_out_needs_images():
    with pytest.raises(DataError, match="^held_out has no images"):
        simulate(FedAvg, [samples(6, 0)], samples(0, 1), device="cpu")


def test_device_that_is_not_there_is_named_by_the_argument(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="^device = cuda: this machine has no usable CUDA GPU"):
        simulate(FedAvg, [samples(6, 0)], samples(6, 1), device="cuda")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Method, "is not a method. Pass a class such as FedAvg"),
        (SimSiam, "^SimSiam compares two views of each image, but train_fl.augmentation is none"),
        (WithoutLabels, "^WithoutLabels trains without labels, but has no setting knn_neighbours"),
    ],
)
def test_methods_that_cannot_be_trained_are_reported(method, words):
    with pytest.raises(ConfigError, match=words):
        simulate(method, [samples(6, 0)], samples(6, 1), device="cpu")


@pytest.mark.parametrize(
    ("method", "same", "words"),
    [
        (SelfSupervisedFedDifRC, (), r"training without labels \(SelfSupervisedFedDifRC\) must not see"),
        (FedDifRC, (0, 2), "has equal features under the prompts"),
    ],
)
def test_features_that_do_not_suit_the_method_are_reported(tmp_path, method, same, words):
    project = tiny_project.make(tmp_path)
    tiny_project.add_features(project, same)
    train, rows = tiny_project.images(48, 0), np.arange(12)
    client = Samples(train.images[rows], train.labels[rows], FeatureSet(project.features_dir), rows)
    with pytest.raises(FeatureSetError, match=words):
        simulate(method, [client], samples(9, 1), device="cpu", **SHORT)
