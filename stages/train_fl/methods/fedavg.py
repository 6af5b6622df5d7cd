"""FedAvg (McMahan et al., AISTATS 2017, algorithm 1): local SGD on cross-entropy, then the weighted mean.

    client k:  w_k <- SGD(w; mean cross-entropy)
    server:    w   <- sum_k (n_k / sum_j n_j) w_k          over the round's participants

The mean is taken over every entry of the state dict. BatchNorm's running statistics are averaged like weights (the
mean of variances leaves out the variance between clients' means, as in all public code); its integer counter of
batches is taken from the first participant.
"""

import torch
from torch import Tensor
from torch.nn import functional

from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.base import ClientState, ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.methods.local_sgd import LocalSGD


class FedAvg:
    """FedAvg; methods that change only the local objective or the aggregation derive from it."""

    def __init__(self, local_sgd: LocalSGD) -> None:
        """Trains locally by `local_sgd`."""
        self._local_sgd = local_sgd

    def init_server(self, weights: Weights) -> ServerState:
        """The initial weights are the only state."""
        return ServerState(weights)

    def init_client(self, weights: Weights) -> ClientState:
        """Clients keep nothing."""
        return {}

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Local SGD on `objective`."""
        update, metrics = self._local_sgd(weights, batches, learning_rate, self.objective)
        return update, state, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """The mean of the participants' weights by sample count."""
        return ServerState(weighted_mean(updates), state.broadcast, state.private), {}

    def objective(self, embeddings: Tensor, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy."""
        return {"cross_entropy": functional.cross_entropy(logits, batch.labels)}


def weighted_mean(updates: list[ClientUpdate]) -> Weights:
    """sum_k (n_k / sum_j n_j) w_k over floating entries; integer entries are the first update's."""
    total = sum(update.num_samples for update in updates)
    mean = {}
    for name, first in updates[0].weights.items():
        if first.is_floating_point():
            parts = [update.weights[name] * (update.num_samples / total) for update in updates]
            mean[name] = torch.stack(parts).sum(0)
        else:
            mean[name] = first.clone()
    return mean
