"""FedProto (Tan et al., AAAI 2022) with FedAvg: embeddings are drawn to their class's global prototype.

    client k:  SGD on  cross-entropy + lambda * mean over B, D of (z_i - C_{y_i})^2
               then C_k^c = mean of z over its samples of class c, and their number n_k^c
    server:    C_c <- sum_k n_k^c C_k^c / sum_k n_k^c;   weights as FedAvg

The paper exchanges prototypes alone and keeps a model per client; a table of global models needs one, hence FedAvg's
mean on top. Prototypes are averaged by samples as in the paper (its code: uniformly over the clients that have the
class). A class that never had a prototype adds 0; one that no participant has this round keeps its own. In the first
round there are none and the term is 0.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from stages.train_fl import losses
from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.base import ClientState, ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.local_sgd import LocalSGD
from stages.train_fl.models import FLModel


class FedProto(FedAvg):
    """FedProto with FedAvg's aggregation."""

    def __init__(self, local_sgd: LocalSGD, prototype_weight: float) -> None:
        """Takes lambda >= 0, 1 in the paper."""
        super().__init__(local_sgd)
        self._weight = prototype_weight

    def init_server(self, weights: Weights) -> ServerState:
        """No class has a prototype; prototypes float (K, D) and known bool (K,) are sent to clients."""
        model, device = self._local_sgd.model, next(iter(weights.values())).device
        prototypes = torch.zeros(model.num_classes, model.embedding_dim, device=device)
        known = torch.zeros(model.num_classes, dtype=torch.bool, device=device)
        return ServerState(weights, broadcast={"prototypes": prototypes, "known": known})

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Local SGD with the prototypes' term; sends its own prototypes' sums (K, D) and counts (K,)."""
        objective = functools.partial(self._attract, prototypes=broadcast["prototypes"], known=broadcast["known"])
        update, metrics = self._local_sgd(weights, batches, learning_rate, objective)
        sums, counts = self._local_sgd.class_sums(batches, FLModel.embed)
        return replace(update, extras={"sums": sums, "counts": counts}), state, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """FedAvg's mean, and the new prototypes."""
        prototypes, known = new_prototypes(
            **state.broadcast,
            sums=torch.stack([update.extras["sums"] for update in updates]),
            counts=torch.stack([update.extras["counts"] for update in updates]),
        )
        broadcast = {"prototypes": prototypes, "known": known}
        return ServerState(self._average(updates, "samples"), broadcast), {}

    def _attract(
        self, model: FLModel, batch: Batch, prototypes: Tensor, known: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings, terms = self.objective(model, batch)
        loss = losses.prototype_loss(embeddings, batch.labels, prototypes, known)
        return embeddings, terms | {"prototype": self._weight * loss}


def new_prototypes(prototypes: Tensor, known: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """C_c <- sum_k n_k^c C_k^c / sum_k n_k^c, where a participant has the class.

    Args:
        prototypes: C, float (K, D).
        known: bool (K,), the class has a prototype.
        sums: n_k^c C_k^c, float (S, K, D): per participant the sum of its embeddings of each class.
        counts: n_k^c, float (S, K).

    Returns:
        The new prototypes and which classes have one.
    """
    total = counts.sum(0)
    mean = sums.sum(0) / total.clamp_min(1)[:, None]
    return torch.where(total[:, None] > 0, mean, prototypes), known | (total > 0)
