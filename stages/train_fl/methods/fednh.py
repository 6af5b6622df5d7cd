"""FedNH (Dai et al., AAAI 2023): class prototypes, spread uniformly at the start, are the classifier.

    model:     logits = s cos(z, W_c); unit rows W_c frozen during local training, s trained
    client k:  SGD on cross-entropy; then mu_k^c = unit(mean over its samples of class c of unit(z)), and n_k^c
    server:    W_c <- unit(rho W_c + (1 - rho) unit(sum_k n_k^c mu_k^c / sum_k n_k^c));   all else: mean

W starts orthonormal (models.CosineClassifier). A class that no participant has keeps its row. The mean of all else is
uniform as in the authors' code (`weighting`), which also clips gradients and decays the rate; that is the run's matter
here. Client prototypes are made after training, in evaluation mode as there, but of clean images.
"""

from dataclasses import replace

import torch
from torch import Tensor

from stages.train_fl.client_data import Batches
from stages.train_fl.losses import unit
from stages.train_fl.methods.base import ClientState, ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.methods.fedavg import FedAvg, Weighting
from stages.train_fl.methods.local_sgd import LocalSGD

PROTOTYPES = "classifier.prototypes"


class FedNH(FedAvg):
    """FedNH, for a model with a cosine classifier."""

    def __init__(self, local_sgd: LocalSGD, smoothing: float, weighting: Weighting) -> None:
        """Takes rho in [0, 1], 0.9 in the paper; "uniform" weighting is the authors'."""
        super().__init__(local_sgd)
        self._smoothing = smoothing
        self._weighting = weighting

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Local SGD; sends prototypes (K, D), zero for a class it lacks, and sample counts (K,)."""
        update, state, metrics = super().client_update(weights, broadcast, state, batches, learning_rate)
        sums, counts = self._local_sgd.class_sums(batches, lambda model, images: unit(model.embed(images)))
        return replace(update, extras={"prototypes": unit(sums), "counts": counts}), state, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """The mean of the body and the smoothed prototypes."""
        average = self._average(updates, self._weighting)
        average[PROTOTYPES] = new_prototypes(
            state.weights[PROTOTYPES],
            torch.stack([update.extras["prototypes"] for update in updates]),
            torch.stack([update.extras["counts"] for update in updates]),
            self._smoothing,
        )
        return ServerState(average), {}


def new_prototypes(prototypes: Tensor, of_clients: Tensor, counts: Tensor, smoothing: float) -> Tensor:
    """W_c <- unit(rho W_c + (1 - rho) unit(sum_k n_k^c mu_k^c)); a row without samples is unchanged.

    Args:
        prototypes: W, float (K, D), unit rows.
        of_clients: mu, float (S, K, D), unit rows per participant.
        counts: n, float (S, K).
        smoothing: rho in [0, 1].
    """
    pooled = unit((counts[:, :, None] * of_clients).sum(0))
    smoothed = unit(smoothing * prototypes + (1 - smoothing) * pooled)
    return torch.where(counts.sum(0)[:, None] > 0, smoothed, prototypes)
