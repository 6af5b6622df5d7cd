"""FedDyn (Acar et al., ICLR 2021): a regulariser per client that makes the local optima agree with the global one.

    client i:  SGD on  cross-entropy + alpha <w, h_i - x> + alpha/2 ||w||^2,  x the server's point
               h_i <- h_i + (w_i - x)
    server:    x <- mean_S w_i + (1/N) sum over all N of h_i

The term's gradient is alpha (w - x + h_i), which is what is added here. h_i is -1/alpha times the paper's gradient
state, as in the authors' code; their alpha_i = alpha / (n_i / mean n) goes with an objective weighted by samples and
is not taken: the paper's objective, alpha and mean over S are uniform. The reported model is mean_S w_i, as in the
authors' code, and not the server's point, which clients start from. With alpha = 0 nothing is regularised and no h is
kept (the paper's h/alpha is 0/0 there): FedAvg with a uniform mean. Buffers are averaged plainly, by samples.
"""

import torch
from torch import Tensor

from stages.train_fl.client_data import Batches
from stages.train_fl.methods.base import ClientState, ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.methods.fedavg import FedAvg, subtract
from stages.train_fl.methods.fedprox import add_proximal_gradient
from stages.train_fl.methods.local_sgd import LocalSGD


class FedDyn(FedAvg):
    """FedDyn."""

    def __init__(self, local_sgd: LocalSGD, num_clients: int, alpha: float) -> None:
        """N clients in all; alpha >= 0, 0.01 in the authors' code."""
        super().__init__(local_sgd)
        self._num_clients = num_clients
        self._alpha = alpha

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Regularised local SGD; the state is h_i (empty before the first time: zero)."""
        if self._alpha == 0:
            return super().client_update(weights, broadcast, state, batches, learning_rate)
        start = self._parameters(weights)
        target = [value - state[name] if state else value for name, value in start.items()]  # x - h_i

        def correct(parameters: list[Tensor], gradients: list[Tensor]) -> None:
            add_proximal_gradient(gradients, parameters, target, self._alpha)

        update, metrics = self._local_sgd(weights, batches, learning_rate, self.objective, correct)
        drift = subtract(self._parameters(update.weights), start)
        return update, {name: value + state[name] if state else value for name, value in drift.items()}, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """The uniform mean, moved by the mean drift over all clients, which is kept."""
        average = self._average(updates, "uniform")
        if self._alpha == 0:
            return ServerState(average), {}
        start = self._parameters(state.weights)
        ends = [self._parameters(update.weights) for update in updates]
        drift = new_mean_drift(state.private, start, ends, self._num_clients)
        moved = {name: average[name] + value for name, value in drift.items()}
        return ServerState(average | moved, private=drift), {}

    def reported_weights(self, state: ServerState) -> Weights:
        """mean_S w_i, up to rounding: the server's point without the drift."""
        return state.weights | {name: state.weights[name] - value for name, value in state.private.items()}


def new_mean_drift(drift: Weights, start: Weights, ends: list[Weights], num_clients: int) -> Weights:
    """(1/N) sum over all N clients of h_i, after the participants' h_i <- h_i + (w_i - x).

    Args:
        drift: the mean before; empty stands for zero.
        start: x, the parameters that clients started from.
        ends: w_i, per participant.
        num_clients: N, all clients.
    """
    new = {name: torch.zeros_like(value) for name, value in start.items()}
    for end in ends:
        for name, value in new.items():
            value.add_(end[name] - start[name], alpha=1 / num_clients)
    return {name: value + drift[name] if drift else value for name, value in new.items()}
