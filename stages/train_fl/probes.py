"""Evaluate frozen embeddings: a k-NN classifier after every round, a linear probe at the end.

Both are fitted on all clients' training images with their labels, and neither is part of training. k-NN is by cosine
similarity with votes weighted by 1 / distance, computed on the device; its loss is the cross-entropy of the votes'
shares, each at least 1e-3. The probe is scikit-learn's multinomial logistic regression on standardised embeddings.
"""

import functools

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from stages.train_fl.client_data import ClientData
from stages.train_fl.data import HeldOut
from stages.train_fl.evaluate import Predictor, in_batches, in_threads
from stages.train_fl.images import ImageRows
from stages.train_fl.models import FLModel

_SMALLEST_SHARE = 1e-3
_ROWS = 100  # that k-NN classifies at a time


class Probes:
    """Evaluates embeddings; an `evaluate.Evaluator`."""

    def __init__(self, clients: list[ClientData], held_out: HeldOut, neighbours: int, num_threads: int = 1) -> None:
        """Fit on the clients' images, evaluate on `held_out`."""
        self._num_threads = num_threads
        self._clients = [client for client in clients if len(client)]
        self._held_out = held_out
        self._labels = np.concatenate([client.labels.cpu().numpy() for client in self._clients])
        self._neighbours = min(neighbours, len(self._labels))

    def scores(self, model: FLModel) -> dict[str, float]:
        """Compute accuracy and loss of the k-NN classifier."""
        train = functional.normalize(self._train_embeddings(model), dim=1)
        labels = torch.from_numpy(self._labels).to(train.device)
        votes = functional.one_hot(labels, int(labels.max()) + 1).to(train.dtype)  # (N, K)
        queries = functional.normalize(self._embed(model, self._held_out.images), dim=1)
        neighbours = functools.partial(vote_shares, train, votes, neighbours=self._neighbours)
        shares = torch.cat(in_threads(neighbours, queries.split(_ROWS), self._num_threads)).cpu().numpy()
        truth = self._held_out.labels.cpu().numpy()
        known = truth < shares.shape[1]  # a class of no client gets no vote
        of_truth = np.where(known, shares[np.arange(len(truth)), np.where(known, truth, 0)], 0)
        loss = -np.log(np.maximum(of_truth, _SMALLEST_SHARE)).mean()
        return {"accuracy": float((shares.argmax(1) == truth).mean()), "loss": float(loss)}

    def final(self, model: FLModel) -> tuple[Predictor, dict[str, float]]:
        """Return the linear probe, and the accuracy of both classifiers."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        with threadpool_limits(1):
            probe.fit(self._train_embeddings(model).cpu().numpy(), self._labels)

        def predict(images: ImageRows) -> Tensor:
            return torch.from_numpy(probe.predict(self._embed(model, images).cpu().numpy())).to(
                self._held_out.labels.device
            )

        right = (predict(self._held_out.images) == self._held_out.labels).double().mean().item()
        return predict, {"linear_probe_accuracy": right, "knn_accuracy": self.scores(model)["accuracy"]}

    def _train_embeddings(self, model: FLModel) -> Tensor:
        return torch.cat([self._embed(model, client.images) for client in self._clients])

    def _embed(self, model: FLModel, images: ImageRows) -> Tensor:
        """Return embeddings float32 (N, embedding_dim) on the device of the held-out images."""
        model.eval()
        return in_batches(model.embed, images, self._held_out.labels.device, self._num_threads)


def vote_shares(train: Tensor, votes: Tensor, queries: Tensor, neighbours: int) -> Tensor:
    """Return each class's share of the votes of each query's nearest neighbours, weighted by 1 / distance.

    Args:
        train: Unit vectors, float (N, D).
        votes: Their labels as one-hot rows, float (N, K).
        queries: Unit vectors, float (M, D).
        neighbours: How many vote, 1 to N. Those at distance 0, if there are any, vote alone.

    Returns:
        float (M, K), rows of sum 1.
    """
    distance, index = (1 - queries @ train.T).clamp_min(0).topk(neighbours, largest=False)  # (M, k)
    same = distance == 0
    weight = torch.where(same.any(1, keepdim=True), same.to(distance.dtype), 1 / distance)
    shares = (weight[:, :, None] * votes[index]).sum(1)
    return shares / shares.sum(1, keepdim=True)
