"""FedAvg (McMahan et al., AISTATS 2017, algorithm 1): local SGD on cross-entropy, then the weighted mean.

    client k:  w_k <- SGD(w; mean cross-entropy)
    server:    w   <- sum_k (n_k / sum_j n_j) w_k          over the round's participants

The mean is taken over every entry of the state dict. BatchNorm's running statistics are averaged like weights in every
method here, and by samples: their coefficients are positive and sum to one, so no variance comes out negative (the mean
of variances leaves out the variance between clients' means, as in all public code); its integer counter of batches is
taken from the first participant.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn import functional

from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.base import ClientState, ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.methods.local_sgd import LocalSGD
from stages.train_fl.models import FLModel

Weighting = Literal["uniform", "samples"]


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
        return ServerState(self._average(updates, "samples"), state.broadcast, state.private), {}

    def reported_weights(self, state: ServerState) -> Weights:
        """The weights that clients start from."""
        return state.weights

    def objective(self, model: FLModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy."""
        embeddings, logits = model(batch.images)
        return embeddings, {"cross_entropy": functional.cross_entropy(logits, batch.labels)}

    def _parameters(self, weights: Weights) -> Weights:
        """The trained parameters among `weights`."""
        return {name: weights[name] for name in self._local_sgd.parameter_names}

    def _average(self, updates: list[ClientUpdate], weighting: Weighting) -> Weights:
        """The participants' mean: buffers by sample count, parameters as `weighting` says."""
        everything = [update.weights for update in updates]
        counts = [update.num_samples for update in updates]
        if weighting == "samples":
            return weighted_mean(everything, counts)
        parameters = weighted_mean([self._parameters(weights) for weights in everything], [1] * len(updates))
        buffers = [{k: v for k, v in weights.items() if k not in parameters} for weights in everything]
        means = parameters | weighted_mean(buffers, counts)
        return {name: means[name] for name in everything[0]}


def weighted_mean(weights: Sequence[Weights], counts: Sequence[float]) -> Weights:
    """sum_k (n_k / sum_j n_j) w_k over floating entries; an integer or boolean entry is the first one's.

    Args:
        weights: a named set of tensors per participant, all with the same names and shapes.
        counts: n_k > 0 per participant, its number of samples.
    """
    total = sum(counts)
    mean = {}
    for name, first in weights[0].items():
        if not first.is_floating_point():
            mean[name] = first.clone()
            continue
        mean[name] = first * (counts[0] / total)
        for other, count in zip(weights[1:], counts[1:], strict=True):
            mean[name].add_(other[name], alpha=count / total)
    return mean


def subtract(minuend: Weights, subtrahend: Weights) -> Weights:
    """The difference, minuend - subtrahend, over the names of the minuend."""
    return {name: value - subtrahend[name] for name, value in minuend.items()}
