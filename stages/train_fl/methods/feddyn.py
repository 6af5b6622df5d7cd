"""FedDyn (Acar et al., ICLR 2021, https://arxiv.org/abs/2111.04263): a dynamic regulariser aligns the local optima.

    client i:  SGD on  cross-entropy + alpha <w, h_i - x> + alpha/2 ||w||^2,  x the server's point
               h_i <- h_i + (w_i - x)
    server:    x <- mean_S w_i + (1/N) sum over all N of h_i

The term's gradient, alpha (w - x + h_i), is added to the loss's. h_i is -1/alpha times the paper's gradient state, as
in the authors' code. The reported model is mean_S w_i, as in the authors' code, and not the server's point, which
clients start from. With alpha = 0 nothing is regularised and no h is kept (the paper's h/alpha is 0/0 there): FedAvg
with a uniform mean. Buffers are averaged by samples, as in FedAvg.

The authors' code has alpha_i = alpha / (n_i / mean n), which belongs to an objective weighted by samples. The paper's
objective, alpha and mean over S are uniform, and so are these.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.settings.params import MethodSettings
from stages.train_fl.client_data import Batches
from stages.train_fl.methods.arithmetic import add_proximal_gradient, subtract
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.state import ClientState, ClientUpdate, Metrics, ServerState, Weights


class FedDyn(FedAvg):
    """FedAvg with a dynamic regulariser per client."""

    class Settings(MethodSettings):
        """The value is the authors' code's."""

        algorithm: Literal["feddyn"] = "feddyn"
        alpha: float = Field(0.01, ge=0, description="weight of the dynamic regulariser; 0 switches it off")

    capturable = True

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Run regularised local SGD; the client keeps h_i (empty, for zero, at first)."""
        alpha = self.settings.alpha
        if alpha == 0:
            return super().client_update(weights, broadcast, state, batches, learning_rate)
        start = self._parameters(weights)
        target = [value - state[name] if state else value for name, value in start.items()]  # x - h_i

        def correct(parameters: list[Tensor], gradients: list[Tensor]) -> None:
            add_proximal_gradient(gradients, parameters, target, alpha)

        update, metrics = self.local_sgd(weights, batches, learning_rate, self.objective, correct)
        drift = subtract(self._parameters(update.weights), start)
        return update, {name: value + state[name] if state else value for name, value in drift.items()}, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """Take the uniform mean, moved by the mean drift over all clients, which the server keeps."""
        average = self._average(updates, "uniform")
        if self.settings.alpha == 0:
            return ServerState(average), {}
        start = self._parameters(state.weights)
        ends = [self._parameters(update.weights) for update in updates]
        drift = new_mean_drift(state.private, start, ends, self.num_clients)
        moved = {name: average[name] + value for name, value in drift.items()}
        return ServerState(average | moved, private=drift), {}

    def reported_weights(self, state: ServerState) -> Weights:
        """Return mean_S w_i, up to rounding: the server's point without the drift."""
        return state.weights | {name: state.weights[name] - value for name, value in state.private.items()}


def new_mean_drift(drift: Weights, start: Weights, ends: list[Weights], num_clients: int) -> Weights:
    """Compute (1/N) sum over all N clients of h_i, after the participants' h_i <- h_i + (w_i - x).

    `drift` is the mean before, empty for zero; x (`start`) are the parameters that clients started from and w_i
    (`ends`) those of each participant after training.
    """
    new = {name: torch.zeros_like(value) for name, value in start.items()}
    for end in ends:
        for name, value in new.items():
            value.add_(end[name] - start[name], alpha=1 / num_clients)
    return {name: value + drift[name] if drift else value for name, value in new.items()}
