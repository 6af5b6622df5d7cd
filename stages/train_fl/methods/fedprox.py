"""FedProx (Li et al., MLSys 2020): FedAvg with a pull towards the global weights.

    client k:  SGD on  cross-entropy + mu/2 ||w - x||^2,  x the global weights, over trained parameters
    server:    as FedAvg

The term's gradient mu (w - x) is added to the loss's, so it passes through the momentum like any gradient and costs one
pass over the parameters instead of a graph through all of them. (FedNova's authors add it to the momentum buffer
in place, where it counts again at every later step; PFLlib's training metric is the norm instead of its square; the
paper's random cut of local work for stragglers is left out.) The first step of a round starts at w = x, where the
term and its gradient are zero.
"""

import torch
from torch import Tensor

from stages.train_fl.client_data import Batches
from stages.train_fl.methods.base import ClientState, ClientUpdate, Metrics, Weights
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.local_sgd import LocalSGD


class FedProx(FedAvg):
    """FedProx."""

    def __init__(self, local_sgd: LocalSGD, proximal_mu: float) -> None:
        """Pulls with weight `proximal_mu`, at least 0; the authors' default is 0.01."""
        super().__init__(local_sgd)
        self._mu = proximal_mu

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Local SGD with the proximal gradient; the metric `proximal` is the term's value after the last step."""
        anchor = list(self._parameters(weights).values())

        def correct(parameters: list[Tensor], gradients: list[Tensor]) -> None:
            add_proximal_gradient(gradients, parameters, anchor, self._mu)

        update, metrics = self._local_sgd(weights, batches, learning_rate, self.objective, correct)
        end = list(self._parameters(update.weights).values())
        return update, state, metrics | {"proximal": proximal_penalty(end, anchor, self._mu).item()}


def proximal_penalty(parameters: list[Tensor], anchor: list[Tensor], mu: float) -> Tensor:
    """mu/2 ||w - x||^2 over a list of tensors w and one of the same shapes x; a scalar."""
    differences = torch._foreach_sub(parameters, anchor)
    return 0.5 * mu * torch.stack(torch._foreach_norm(differences)).square().sum()


def add_proximal_gradient(gradients: list[Tensor], parameters: list[Tensor], anchor: list[Tensor], mu: float) -> None:
    """Adds the gradient: gradients += mu (w - x), in place; that of `proximal_penalty`."""
    torch._foreach_add_(gradients, torch._foreach_sub(parameters, anchor), alpha=mu)
