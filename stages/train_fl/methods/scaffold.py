"""SCAFFOLD (Karimireddy et al., ICML 2020, algorithm 1, option II): control variates correct the local gradients.

    client i:  y <- y - lr (g(y) - c_i + c), K steps from x
               c_i+ = c_i - c + (x - y) / (K lr)
    server:    x <- x + lr_g mean_S (y_i - x);   c <- c + (1/N) sum_S (c_i+ - c_i)

The mean over the participants S is uniform, as in the paper (NIID-Bench and Flower weight it by samples: `weighting`).
The correction is added to the gradient before the optimiser, so it passes through the momentum; x - y is then
lr * sum_k a_k (g_k - c_i + c), and K stands for sum_k a_k (FedNova's normaliser, which is the number of steps without
momentum). Hence always c_i+ = sum_k a_k g_k / sum_k a_k, a mean of the raw gradients, weight decay included. Public
code corrects outside of the momentum and divides by K, which makes c_i grow to ten times a gradient at momentum 0.9.
Control variates start at zero (NIID-Bench starts them as random networks, Flower as the initial weights), cover the
trained parameters alone (NIID-Bench also corrects BatchNorm's running statistics), and use the steps and rate taken.
A client keeps its c_i while it is not sampled.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stages.train_fl.client_data import Batches
from stages.train_fl.methods.base import ClientState, ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.methods.fedavg import FedAvg, Weighting, subtract
from stages.train_fl.methods.fedavgm import relax
from stages.train_fl.methods.fednova import normaliser
from stages.train_fl.methods.local_sgd import LocalSGD


class Scaffold(FedAvg):
    """SCAFFOLD."""

    def __init__(
        self, local_sgd: LocalSGD, num_clients: int, server_learning_rate: float, weighting: Weighting
    ) -> None:
        """N clients in all; lr_g, 1 in the paper's experiments; "uniform" weighting is the paper's."""
        super().__init__(local_sgd)
        self._num_clients = num_clients
        self._server_learning_rate = server_learning_rate
        self._weighting = weighting

    def init_server(self, weights: Weights) -> ServerState:
        """The server's control variate c, zero, is sent to clients."""
        return ServerState(weights, broadcast=self._zeros(weights))

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Corrected local SGD; the state is c_i (empty before the first time: zero); sends c_i+ - c_i."""
        control = state or self._zeros(weights)
        offsets = [broadcast[name] - control[name] for name in self._local_sgd.parameter_names]

        def correct(parameters: list[Tensor], gradients: list[Tensor]) -> None:
            torch._foreach_add_(gradients, offsets)  # g - c_i + c

        update, metrics = self._local_sgd(weights, batches, learning_rate, self.objective, correct)
        steps = normaliser(update.num_steps, self._local_sgd.momentum)
        start, end = self._parameters(weights), self._parameters(update.weights)
        new = new_control(control, broadcast, start, end, learning_rate, steps)
        return replace(update, extras=subtract(new, control)), new, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """The server's step and its new control variate."""
        average = self._average(updates, self._weighting)
        start, mean = self._parameters(state.weights), self._parameters(average)
        parameters = relax(start, mean, self._server_learning_rate)
        control = new_server_control(state.broadcast, [update.extras for update in updates], self._num_clients)
        return ServerState(average | parameters, broadcast=control), {}

    def _zeros(self, weights: Weights) -> Weights:
        return {name: torch.zeros_like(value) for name, value in self._parameters(weights).items()}


def new_control(
    control: Weights, server_control: Weights, start: Weights, end: Weights, learning_rate: float, num_steps: float
) -> Weights:
    """c_i+ = c_i - c + (x - y) / (K lr).

    Args:
        control: c_i, by parameter name.
        server_control: c.
        start: x, the parameters that training started from.
        end: y, those after it.
        learning_rate: lr of this round.
        num_steps: K; with momentum, the sum of the gradients' coefficients (`fednova.normaliser`).
    """
    return {
        name: value - server_control[name] + (start[name] - end[name]) / (num_steps * learning_rate)
        for name, value in control.items()
    }


def new_server_control(server_control: Weights, changes: Sequence[Weights], num_clients: int) -> Weights:
    """The server's new control variate, c + (1/N) sum_S (c_i+ - c_i); `changes` are the participants' c_i+ - c_i."""
    control = {name: value.clone() for name, value in server_control.items()}
    for change in changes:
        for name, value in control.items():
            value.add_(change[name], alpha=1 / num_clients)
    return control
