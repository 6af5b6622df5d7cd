"""A tiny real model with BatchNorm, tiny clients, and one federated round, for the tests of methods."""

import torch
from torch import nn

from stages.train_fl.client_data import Batches, ClientData
from stages.train_fl.guidance import GuidanceTargets
from stages.train_fl.methods import LocalSGD, Scaffold
from stages.train_fl.models import CosineClassifier, FLModel, GaussianBottleneck

torch.set_num_threads(1)  # for tensors this small, threads only wait for one another

CLASSES, DIM, PROMPTS = 3, 6, 3
GUIDANCE = dict(temperature=0.1, ndcr_targets="raw")


def tiny_model(latent_dim=None, cosine_scale=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = nn.Sequential(
            nn.Conv2d(3, 4, 4, stride=4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, DIM)
        )
        model = FLModel(encoder, DIM, CLASSES)
        if latent_dim:
            model.bottleneck, model.embedding_dim = GaussianBottleneck(DIM, latent_dim), latent_dim
            model.classifier = nn.Linear(latent_dim, CLASSES)
        if cosine_scale:
            model.classifier = CosineClassifier(DIM, CLASSES, cosine_scale)
    return model


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def client(size, seed):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (size, 3, 8, 8), generator=g, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (size,), generator=g)
    rows = GuidanceTargets(
        torch.randn(size, DIM, generator=g),
        nn.functional.normalize(torch.randn(size, PROMPTS, DIM, generator=g), dim=2),
        labels,
    )  # fmt: skip
    return ClientData(images, labels, rows)


def batches(data, seed=0, epochs=2, batch_size=4):
    return Batches(data, epochs, batch_size, "none", torch.Generator().manual_seed(seed))


def local_sgd(momentum=0.9, weight_decay=0.01, guidance=None, **parts):
    return LocalSGD(tiny_model(**parts), momentum, weight_decay, guidance)


def train(method, clients, rounds=((0, 1), (1, 2), (0, 2)), learning_rate=0.1):
    """Run rounds with the given participants; return the server's state after each."""
    server = method.init_server(state_of(method.local_sgd.model))
    states = [method.init_client(server.weights) for _ in clients]
    history = []
    for number, participants in enumerate(rounds):
        updates = []
        for k in participants:
            update, states[k], _ = method.client_update(
                server.weights, server.broadcast, states[k], batches(clients[k], 100 * number + k), learning_rate
            )
            updates.append(update)
        server, _ = method.server_update(server, updates)
        history.append(server)
    return history


def record_layouts(monkeypatch):
    """Return a list that gets, for each update of a SCAFFOLD client, what it was given in which layout.

    An entry has the number of channels-last tensors of the network, of the weights, and of both control variates; and
    the names of tensors that have other strides than the network's own.
    """
    seen, original = [], Scaffold.client_update

    def update(self, weights, broadcast, state, batches, learning_rate):
        own = self.local_sgd.model.state_dict()
        given = (weights, broadcast, state)
        others = [name for part in given for name, value in part.items() if value.stride() != own[name].stride()]
        seen.append(([sum(not value.is_contiguous() for value in part.values()) for part in (own, *given)], others))
        return original(self, weights, broadcast, state, batches, learning_rate)

    monkeypatch.setattr(Scaffold, "client_update", update)
    return seen


def to_bytes(weights):
    return {name: value.numpy().tobytes() for name, value in weights.items()}
