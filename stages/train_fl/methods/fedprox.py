"""FedProx (Li et al., MLSys 2020, https://arxiv.org/abs/1812.06127): FedAvg with a pull towards the global weights.

    client k:  SGD on  cross-entropy + mu/2 ||w - x||^2,  x the global weights, over trained parameters
    server:    as FedAvg

The term's gradient mu (w - x) is added to the loss's. It therefore passes through the momentum like any gradient, and
costs one pass over the parameters instead of a graph through all of them.

Differences from public code:

- FedNova's authors add the gradient to the momentum buffer in place, where it counts again at every later step.
- PFLlib's training metric is the norm instead of its square.
- The paper's random reduction of local work for stragglers is omitted.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from pipeline.settings.params import MethodSettings
from stages.train_fl.client_data import Batches
from stages.train_fl.methods.arithmetic import add_proximal_gradient, proximal_penalty
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.state import ClientState, ClientUpdate, Metrics, Weights


class FedProx(FedAvg):
    """FedAvg with a proximal term in the local objective."""

    class Settings(MethodSettings):
        """The value is the authors' default."""

        algorithm: Literal["fedprox"] = "fedprox"
        proximal_mu: float = Field(0.01, ge=0, description="weight of the squared distance to the global weights")

    sends_only_weights = True
    capturable = True

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Run local SGD with the proximal gradient; the metric `proximal` is the term's value after the last step."""
        mu, anchor = self.settings.proximal_mu, list(self._parameters(weights).values())

        def correct(parameters: list[Tensor], gradients: list[Tensor]) -> None:
            add_proximal_gradient(gradients, parameters, anchor, mu)

        update, metrics = self.local_sgd(weights, batches, learning_rate, self.objective, correct)
        end = list(self._parameters(update.weights).values())
        return update, state, metrics | {"proximal": proximal_penalty(end, anchor, mu).item()}
