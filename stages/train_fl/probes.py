"""Evaluate frozen embeddings: a k-NN classifier after every round, a linear probe at the end.

scikit-learn fits both on all clients' training images with their labels. k-NN is by cosine similarity with votes
weighted by 1 / distance; its loss is the cross-entropy of the votes' shares, each at least 1e-3. The probe is
multinomial logistic regression on standardised embeddings. Neither is part of training.
"""

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from stages.train_fl.client_data import ClientData
from stages.train_fl.data import HeldOut
from stages.train_fl.evaluate import Predictor, in_batches, in_threads
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
        from sklearn.neighbors import KNeighborsClassifier

        knn = KNeighborsClassifier(self._neighbours, metric="cosine", weights="distance")
        knn.fit(self._train_embeddings(model), self._labels)
        queries = self._embed(model, self._held_out.images)
        with threadpool_limits(1):  # so that the sums do not depend on the number of cores
            chunks = [queries[start : start + _ROWS] for start in range(0, len(queries), _ROWS)]
            shares = np.concatenate(in_threads(knn.predict_proba, chunks, self._num_threads))
        truth = self._held_out.labels.cpu().numpy()
        right = knn.classes_[shares.argmax(1)] == truth
        of_truth = (shares * (knn.classes_ == truth[:, None])).sum(1)
        loss = -np.log(np.maximum(of_truth, _SMALLEST_SHARE)).mean()
        return {"accuracy": float(right.mean()), "loss": float(loss)}

    def final(self, model: FLModel) -> tuple[Predictor, dict[str, float]]:
        """Return the linear probe, and the accuracy of both classifiers."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        with threadpool_limits(1):
            probe.fit(self._train_embeddings(model), self._labels)

        def predict(images: Tensor) -> Tensor:
            return torch.from_numpy(probe.predict(self._embed(model, images))).to(self._held_out.labels.device)

        right = (predict(self._held_out.images) == self._held_out.labels).double().mean().item()
        return predict, {"linear_probe_accuracy": right, "knn_accuracy": self.scores(model)["accuracy"]}

    def _train_embeddings(self, model: FLModel) -> np.ndarray:
        return np.concatenate([self._embed(model, client.images) for client in self._clients])

    def _embed(self, model: FLModel, images: Tensor) -> np.ndarray:
        """Return embeddings float32 (N, embedding_dim)."""
        model.eval()
        return in_batches(model.embed, images, self._held_out.labels.device, self._num_threads).cpu().numpy()
