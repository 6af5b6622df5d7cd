"""MOON (Li et al., CVPR 2021, https://arxiv.org/abs/2103.16257): model-contrastive learning.

    client k:  SGD on  cross-entropy + mu * mean_i -log( e^{g_i/T} / (e^{g_i/T} + e^{p_i/T}) )
               g_i = cos(z_i, z_i^glob),  p_i = cos(z_i, z_i^prev)
    server:    as FedAvg

z is the embedding that the classifier sees: the encoder's, or the projection head's if `train_fl.projection_dim` sets
one. The authors' network always has the head, also for FedAvg; here one setting covers all methods. z^glob comes from
the global model and z^prev from the client's model after its last participation, which is the client's state (one
model, the authors' buffer size). Both are frozen and in evaluation mode. In its first participation a client has no
previous model and the term is 0, as in the authors' code. (PFLlib leaves both models in training mode, which moves
their BatchNorm, and starts from the initial model as the previous one, log 2.)
"""

import copy
import functools
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.settings.params import MethodSettings, Section
from stages.train_fl import losses
from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.local_sgd import LocalSGD
from stages.train_fl.methods.state import ClientState, ClientUpdate, Metrics, Weights
from stages.train_fl.models import FLModel


class Moon(FedAvg):
    """FedAvg with a contrast between the global and the client's previous model."""

    class Settings(MethodSettings):
        """The values are the paper's, mu for CIFAR-10."""

        algorithm: Literal["moon"] = "moon"
        contrastive_weight: float = Field(5.0, ge=0, description="weight of the model-contrastive loss (mu)")
        temperature: float = Field(0.5, gt=0, description="its temperature (T)")

    sends_only_weights = True
    capturable = True

    def __init__(self, local_sgd: LocalSGD, settings: Section | None = None, num_clients: int = 1) -> None:
        """Copy the network twice, for the global and the previous model."""
        super().__init__(local_sgd, settings, num_clients)
        self._global_model, self._previous_model = (
            copy.deepcopy(local_sgd.model).eval().requires_grad_(False) for _ in range(2)
        )

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Run contrastive local SGD; the client keeps the model it trained (nothing before its first round)."""
        self._global_model.load_state_dict(weights)
        if state:
            self._previous_model.load_state_dict(state)
        objective = functools.partial(self._contrast, has_previous=bool(state))
        update, metrics = self.local_sgd(weights, batches, learning_rate, objective)
        return update, update.weights, metrics

    def _contrast(self, model: FLModel, batch: Batch, has_previous: bool) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings, terms = self.objective(model, batch)
        if not has_previous:
            return embeddings, terms | {"contrastive": torch.zeros_like(terms["cross_entropy"])}
        with torch.no_grad():
            of_global, of_previous = (m.embed(batch.images) for m in (self._global_model, self._previous_model))
        loss = losses.moon_loss(embeddings, of_global, of_previous, self.settings.temperature)
        return embeddings, terms | {"contrastive": self.settings.contrastive_weight * loss}
