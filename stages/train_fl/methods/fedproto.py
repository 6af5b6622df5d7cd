"""FedProto (Tan et al., AAAI 2022, https://arxiv.org/abs/2105.00243) with FedAvg's aggregation.

    client k:  SGD on  cross-entropy + lambda * mean over B, D of (z_i - C_{y_i})^2
               then C_k^c = mean of z over its samples of class c, and their number n_k^c
    server:    C_c <- sum_k n_k^c C_k^c / sum_k n_k^c;   weights as FedAvg

Embeddings are drawn to their class's global prototype. A class that never had a prototype contributes 0; one that no
participant has this round keeps its prototype. In the first round there are none and the term is 0.

The paper exchanges only prototypes and keeps a model per client; a comparison of global models needs one, hence
FedAvg's mean. Prototypes are averaged by samples, as in the paper; its code averages uniformly over the clients that
have the class.
"""

import functools
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.settings.params import MethodSettings
from stages.train_fl import losses
from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.state import ClientState, ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.models import FLModel


class FedProto(FedAvg):
    """FedProto with FedAvg's aggregation of the weights."""

    class Settings(MethodSettings):
        """The value is the paper's."""

        algorithm: Literal["fedproto"] = "fedproto"
        prototype_weight: float = Field(1.0, ge=0, description="weight of the distance to the class's global prototype")

    capturable = True

    def init_server(self, weights: Weights) -> ServerState:
        """Broadcast prototypes, float (K, D), and which of them are known, bool (K,): none yet."""
        model, device = self.local_sgd.model, next(iter(weights.values())).device
        prototypes = torch.zeros(model.num_classes, model.embedding_dim, device=device)
        known = torch.zeros(model.num_classes, dtype=torch.bool, device=device)
        return ServerState(weights, broadcast={"prototypes": prototypes, "known": known})

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Run local SGD with the prototypes' term; send the sums (K, D) and counts (K,) of its own prototypes."""
        objective = functools.partial(self._attract, prototypes=broadcast["prototypes"], known=broadcast["known"])
        update, metrics = self.local_sgd(weights, batches, learning_rate, objective)
        sums, counts = self.local_sgd.class_sums(batches, FLModel.embed)
        return replace(update, extras={"sums": sums, "counts": counts}), state, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """Average the weights as FedAvg, and update the prototypes."""
        prototypes, known = new_prototypes(**state.broadcast, **self._stack_extras(updates))
        return ServerState(self._average(updates, "samples"), {"prototypes": prototypes, "known": known}), {}

    def _attract(
        self, model: FLModel, batch: Batch, prototypes: Tensor, known: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings, terms = self.objective(model, batch)
        loss = losses.prototype_loss(embeddings, batch.labels, prototypes, known)
        return embeddings, terms | {"prototype": self.settings.prototype_weight * loss}


def new_prototypes(prototypes: Tensor, known: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Average the clients' prototypes: C_c <- sum_k n_k^c C_k^c / sum_k n_k^c, if a participant has the class.

    The prototypes C are float (K, D), and `known`, bool (K,), marks the classes that have one; both are returned,
    updated. `sums` are the participants' sums n_k^c C_k^c of embeddings, float (S, K, D), and `counts` n_k^c (S, K).
    """
    total = counts.sum(0)
    mean = sums.sum(0) / total.clamp_min(1)[:, None]
    return torch.where(total[:, None] > 0, mean, prototypes), known | (total > 0)
