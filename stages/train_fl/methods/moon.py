"""MOON (Li et al., CVPR 2021): model-contrastive learning.

    client k:  SGD on  cross-entropy + mu * mean_i -log( e^{g_i/T} / (e^{g_i/T} + e^{p_i/T}) )
               g_i = cos(z_i, z_i^glob),  p_i = cos(z_i, z_i^prev)
    server:    as FedAvg

z is the embedding that the classifier sees: the encoder's, or the projection head's where `train_fl.projection_dim`
asks for one. The authors' network always has the head, and their FedAvg too; here it is one key for all methods.
z^glob is made by the global and z^prev by the client's model after its last participation (kept as client state, one
model, the authors' buffer size). Both are frozen and in evaluation mode (PFLlib leaves them in training mode and moves
their BatchNorm). In its first participation a client has no previous model and the term is 0, as in the authors' code
(PFLlib takes the initial model: log 2).
"""

import copy
import functools

import torch
from torch import Tensor

from stages.train_fl import losses
from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.base import ClientState, ClientUpdate, Metrics, Weights
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.local_sgd import LocalSGD
from stages.train_fl.models import FLModel


class Moon(FedAvg):
    """MOON."""

    def __init__(self, local_sgd: LocalSGD, contrastive_weight: float, temperature: float) -> None:
        """Takes mu >= 0, 5 for CIFAR-10 in the paper, and T > 0, 0.5 in the paper."""
        super().__init__(local_sgd)
        self._weight = contrastive_weight
        self._temperature = temperature
        self._global_model, self._previous_model = (
            copy.deepcopy(local_sgd.model).eval().requires_grad_(False) for _ in range(2)
        )

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Contrastive local SGD; the state is the model that came out (empty before the first time)."""
        self._global_model.load_state_dict(weights)
        if state:
            self._previous_model.load_state_dict(state)
        objective = functools.partial(self._contrast, has_previous=bool(state))
        update, metrics = self._local_sgd(weights, batches, learning_rate, objective)
        return update, update.weights, metrics

    def _contrast(self, model: FLModel, batch: Batch, has_previous: bool) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings, terms = self.objective(model, batch)
        if not has_previous:
            return embeddings, terms | {"contrastive": torch.zeros_like(terms["cross_entropy"])}
        with torch.no_grad():
            of_global = self._global_model.embed(batch.images)
            of_previous = self._previous_model.embed(batch.images)
        loss = losses.moon_loss(embeddings, of_global, of_previous, self._temperature)
        return embeddings, terms | {"contrastive": self._weight * loss}
