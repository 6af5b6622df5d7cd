"""SCAFFOLD (Karimireddy et al., ICML 2020, https://arxiv.org/abs/1910.06378, algorithm 1, option II).

    client i:  y <- y - lr (g(y) - c_i + c), K steps from x
               c_i+ = c_i - c + (x - y) / (K lr)
    server:    x <- x + lr_g mean_S (y_i - x);   c <- c + (1/N) sum_S (c_i+ - c_i)

Control variates c correct the local gradients. A client keeps its c_i while it is not sampled. The mean over the
participants S is uniform, as in the paper. The correction is added to the gradient before the optimiser, so it passes
through the momentum; x - y is then lr * sum_k a_k (g_k - c_i + c), and K means sum_k a_k (FedNova's normaliser, which
without momentum is the number of steps). Hence always c_i+ = sum_k a_k g_k / sum_k a_k, a mean of the raw gradients,
weight decay included.

Differences from public code:

- It corrects outside of the momentum and divides by K, which makes c_i grow to ten times a gradient at momentum 0.9.
- NIID-Bench and Flower weight the mean by samples (`weighting`).
- Control variates start at zero; NIID-Bench starts them as random networks, Flower as the initial weights.
- They cover only the trained parameters; NIID-Bench also corrects BatchNorm's running statistics.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.settings.params import MethodSettings
from stages.train_fl.client_data import Batches
from stages.train_fl.methods.arithmetic import normaliser, relax, subtract
from stages.train_fl.methods.fedavg import FedAvg, Weighting
from stages.train_fl.methods.state import ClientState, ClientUpdate, Metrics, ServerState, Weights


class Scaffold(FedAvg):
    """FedAvg with control variates on the server and the clients."""

    class Settings(MethodSettings):
        """The values are the paper's experiments'."""

        algorithm: Literal["scaffold"] = "scaffold"
        server_learning_rate: float = Field(1.0, gt=0, description="the server's step towards the participants' mean")
        weighting: Weighting = Field("uniform", description="the mean over participants: uniform (paper) or by samples")

    capturable = True

    def init_server(self, weights: Weights) -> ServerState:
        """Broadcast the server's control variate c, zero."""
        return ServerState(weights, broadcast=self._zeros(weights))

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Run corrected local SGD and send c_i+ - c_i; the client keeps c_i (empty, for zero, at first)."""
        control = state or self._zeros(weights)
        offsets = [broadcast[name] - control[name] for name in self.local_sgd.parameter_names]

        def correct(parameters: list[Tensor], gradients: list[Tensor]) -> None:
            torch._foreach_add_(gradients, offsets)  # g - c_i + c

        update, metrics = self.local_sgd(weights, batches, learning_rate, self.objective, correct)
        steps = normaliser(update.num_steps, self.local_sgd.momentum)
        start, end = self._parameters(weights), self._parameters(update.weights)
        new = new_control(control, broadcast, start, end, learning_rate, steps)
        return replace(update, extras=subtract(new, control)), new, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """Take the server's step and update its control variate."""
        average = self._average(updates, self.settings.weighting)
        start, mean = self._parameters(state.weights), self._parameters(average)
        parameters = relax(start, mean, self.settings.server_learning_rate)
        control = new_server_control(state.broadcast, [update.extras for update in updates], self.num_clients)
        return ServerState(average | parameters, broadcast=control), {}

    def _zeros(self, weights: Weights) -> Weights:
        return {name: torch.zeros_like(value) for name, value in self._parameters(weights).items()}


def new_control(
    control: Weights, server_control: Weights, start: Weights, end: Weights, learning_rate: float, num_steps: float
) -> Weights:
    """Compute the client's control variate, c_i+ = c_i - c + (x - y) / (K lr).

    x (`start`) and y (`end`) are the parameters before and after training, lr the round's learning rate, and K the
    number of steps; with momentum, the sum of the gradients' coefficients (`normaliser`).
    """
    return {
        name: value - server_control[name] + (start[name] - end[name]) / (num_steps * learning_rate)
        for name, value in control.items()
    }


def new_server_control(server_control: Weights, changes: Sequence[Weights], num_clients: int) -> Weights:
    """Compute c + (1/N) sum_S (c_i+ - c_i), where `changes` are the participants' c_i+ - c_i."""
    control = {name: value.clone() for name, value in server_control.items()}
    for change in changes:
        for name, value in control.items():
            value.add_(change[name], alpha=1 / num_clients)
    return control
