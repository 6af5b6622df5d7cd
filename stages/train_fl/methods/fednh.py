"""FedNH (Dai et al., AAAI 2023, https://arxiv.org/abs/2212.02758): uniformly spread prototypes as the classifier.

    model:     logits = s cos(z, W_c); unit rows W_c frozen during local training, s trained
    client k:  SGD on cross-entropy; then mu_k^c = unit(mean over its samples of class c of unit(z)), and n_k^c
    server:    W_c <- unit(rho W_c + (1 - rho) unit(sum_k n_k^c mu_k^c / sum_k n_k^c));   all else: mean

W starts orthonormal (models.CosineClassifier). A class that no participant has keeps its row. The mean of all else is
uniform, as in the authors' code (`weighting`). Their code also clips gradients and decays the learning rate, which here
are settings of the run, and computes the clients' prototypes from augmented images; here they are unaugmented.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.settings.params import MethodSettings
from stages.train_fl.client_data import Batches
from stages.train_fl.losses import unit
from stages.train_fl.methods.fedavg import FedAvg, Weighting
from stages.train_fl.methods.state import ClientState, ClientUpdate, Metrics, ServerState, Weights

PROTOTYPES = "classifier.prototypes"


class FedNH(FedAvg):
    """FedNH, with a cosine classifier in its model."""

    class Settings(MethodSettings):
        """The values are the paper's."""

        algorithm: Literal["fednh"] = "fednh"
        smoothing: float = Field(0.9, ge=0, le=1, description="share of the old prototypes that the server keeps (rho)")
        scale: float = Field(20.0, gt=0, description="initial value of the trainable factor on the cosines")
        weighting: Weighting = Field(
            "uniform", description="mean over participants: uniform (authors' code) or samples"
        )

    capturable = True

    @classmethod
    def model_parts(cls, settings: Any) -> dict[str, Any]:
        """Replace the classifier by one on cosines."""
        return {"cosine_scale": settings.scale}

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Run local SGD; send prototypes (K, D), zero for a class it lacks, and sample counts (K,)."""
        update, state, metrics = super().client_update(weights, broadcast, state, batches, learning_rate)
        sums, counts = self.local_sgd.class_sums(batches, lambda model, images: unit(model.embed(images)))
        return replace(update, extras={"prototypes": unit(sums), "counts": counts}), state, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """Average the body and smooth the prototypes."""
        sent, smoothing = self._stack_extras(updates), self.settings.smoothing
        rows = new_prototypes(state.weights[PROTOTYPES], sent["prototypes"], sent["counts"], smoothing)
        return ServerState(self._average(updates, self.settings.weighting) | {PROTOTYPES: rows}), {}


def new_prototypes(prototypes: Tensor, of_clients: Tensor, counts: Tensor, smoothing: float) -> Tensor:
    """Update the prototypes: W_c <- unit(rho W_c + (1 - rho) unit(sum_k n_k^c mu_k^c)).

    The prototypes W are float (K, D) and the participants' mu (S, K, D), of unit rows; counts n are float (S, K), and
    the row of a class without samples is unchanged; the smoothing rho is in [0, 1].
    """
    pooled = unit((counts[:, :, None] * of_clients).sum(0))
    smoothed = unit(smoothing * prototypes + (1 - smoothing) * pooled)
    return torch.where(counts.sum(0)[:, None] > 0, smoothed, prototypes)
