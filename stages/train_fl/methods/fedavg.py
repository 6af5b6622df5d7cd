"""FedAvg (McMahan et al., AISTATS 2017, https://arxiv.org/abs/1602.05629, algorithm 1): local SGD, then the mean.

    client k:  w_k <- SGD(w; mean cross-entropy)
    server:    w   <- sum_k (n_k / sum_j n_j) w_k          over the round's participants

The mean covers every entry of the state dict. Every method averages BatchNorm's running statistics by samples: these
coefficients are positive and sum to one, so no variance becomes negative. (As in all public code, the mean of variances
omits the variance between the clients' means.) BatchNorm's integer counter of batches is the first participant's.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.settings.params import MethodSettings
from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.arithmetic import weighted_mean
from stages.train_fl.methods.base import Method
from stages.train_fl.methods.state import ClientState, ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.models import FLModel

Weighting = Literal["uniform", "samples"]


class FedAvg(Method):
    """FedAvg. Methods that change only the local objective or the aggregation derive from it."""

    class Settings(MethodSettings):
        """FedAvg has no settings of its own."""

        algorithm: Literal["fedavg"] = "fedavg"

    sends_only_weights = True
    capturable = True

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Run local SGD on `objective`."""
        update, metrics = self.local_sgd(weights, batches, learning_rate, self.objective)
        return update, state, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """Average the participants' weights by sample count."""
        return ServerState(self._average(updates, "samples"), state.broadcast, state.private), {}

    def objective(self, model: FLModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the batch's embeddings (B, D) and its mean cross-entropy."""
        embeddings, logits = model(batch.images)
        return embeddings, {"cross_entropy": functional.cross_entropy(logits, batch.labels)}

    def _parameters(self, weights: Weights) -> Weights:
        """Select the trained parameters among `weights`."""
        return {name: weights[name] for name in self.local_sgd.parameter_names}

    def _average(self, updates: list[ClientUpdate], weighting: Weighting) -> Weights:
        """Average the participants: buffers by sample count, parameters according to `weighting`."""
        everything, counts = [update.weights for update in updates], [update.num_samples for update in updates]
        if weighting == "samples":
            return weighted_mean(everything, counts)
        parameters = weighted_mean([self._parameters(weights) for weights in everything], [1] * len(updates))
        buffers = [{k: v for k, v in weights.items() if k not in parameters} for weights in everything]
        means = parameters | weighted_mean(buffers, counts)
        return {name: means[name] for name in everything[0]}

    def _stack_extras(self, updates: list[ClientUpdate]) -> Weights:
        """Stack what the participants sent besides their weights, by name: (S, ...)."""
        return {name: torch.stack([update.extras[name] for update in updates]) for name in updates[0].extras}
