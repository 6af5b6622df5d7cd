"""FedNova (Wang et al., NeurIPS 2020): clients that take more steps do not pull harder.

    client i:  y_i <- SGD(x), so that x - y_i = lr * sum_k a_ik g_ik;   sends ||a_i||_1
    server:    x <- x - tau_eff * sum_i p_i (x - y_i) / ||a_i||_1
               tau_eff = sum_i p_i ||a_i||_1,   p_i = n_i / sum_j n_j

||a||_1 is taken from the optimiser's own recursion, for momentum and proximal term together: the official one adds the
proximal term to the momentum buffer in place and mixes both recursions, and so divides by 7.999 where the update's
coefficients sum to 5.3725 (3 steps, momentum 0.9, lr*mu 0.05). tau_eff is the same sum with a proximal term too (the
official code then takes the mean number of steps). p_i is over the round's participants. Only parameters are
normalised: the coefficients p_i tau_eff / ||a_i|| do not sum to one, and would turn BatchNorm's variances (0.05, 0.9,
1.0) into -6.4; buffers are averaged plainly. The recursion holds as the momentum starts anew each round.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from stages.train_fl.client_data import Batches
from stages.train_fl.methods.base import ClientState, ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.methods.fedavg import weighted_mean
from stages.train_fl.methods.fedavgm import server_momentum_step
from stages.train_fl.methods.fedprox import FedProx
from stages.train_fl.methods.local_sgd import LocalSGD


class FedNova(FedProx):
    """FedNova; with `proximal_mu` > 0 its local solver is FedProx's."""

    def __init__(self, local_sgd: LocalSGD, proximal_mu: float, server_momentum: float) -> None:
        """Args as in the authors' code: mu of the proximal term and gmf, the server's momentum (0 there)."""
        super().__init__(local_sgd, proximal_mu)
        self._server_momentum = server_momentum

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Local SGD; sends the sum of its gradients' coefficients, float64 ()."""
        update, state, metrics = super().client_update(weights, broadcast, state, batches, learning_rate)
        steps = normaliser(update.num_steps, self._local_sgd.momentum, learning_rate * self._mu)
        return replace(update, extras={"normaliser": torch.tensor(steps, dtype=torch.float64)}), state, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """The normalised mean; then the server's momentum where there is one."""
        start = self._parameters(state.weights)
        ends = [self._parameters(update.weights) for update in updates]
        counts = [update.num_samples for update in updates]
        steps = [float(update.extras["normaliser"]) for update in updates]
        parameters, velocity = normalised_mean(start, ends, counts, steps), state.private
        if self._server_momentum:
            parameters, velocity = server_momentum_step(start, parameters, velocity, self._server_momentum, 1.0)
        return ServerState(self._average(updates, "samples") | parameters, private=velocity), {}


def normaliser(num_steps: int, momentum: float, lr_mu: float = 0.0) -> float:
    """The sum of the coefficients a_k in x - y = lr * sum_k a_k g_k after `num_steps` of SGD from x.

    The step is v <- momentum v + g + mu (y - x), y <- y - lr v with v = 0 at first. In units of lr, the distance s and
    the buffer u of a constant unit gradient obey u <- momentum u + 1 - lr_mu s, s <- s + u, and the sum is s. Closed
    forms: tau; [tau - rho (1 - rho^tau) / (1 - rho)] / (1 - rho) with momentum rho; [1 - (1 - lr_mu)^tau] / lr_mu.

    Args:
        num_steps: tau, the optimiser steps that were taken.
        momentum: rho, 0 to 1.
        lr_mu: learning rate times proximal_mu.
    """
    distance = buffer = 0.0
    for _ in range(num_steps):
        buffer = momentum * buffer + 1 - lr_mu * distance
        distance += buffer
    return distance


def normalised_mean(
    start: Weights, ends: Sequence[Weights], counts: Sequence[float], normalisers: Sequence[float]
) -> Weights:
    """The server's step, x - tau_eff sum_i p_i (x - y_i) / a_i with tau_eff = sum_i p_i a_i; no buffers.

    Written as sum_i p_i r_i y_i + (1 - sum_i p_i r_i) x with r_i = tau_eff / a_i: with equal a_i every r_i is exactly 1
    and the result is `weighted_mean`, to the byte.

    Args:
        start: x, the parameters that clients started from.
        ends: y_i, per participant.
        counts: n_i per participant.
        normalisers: a_i = ||a_i||_1 per participant, positive.
    """
    total = sum(counts)
    ratios = [sum(n * (a / own) for n, a in zip(counts, normalisers, strict=True)) / total for own in normalisers]
    rest = sum(n / total * (1 - ratio) for n, ratio in zip(counts, ratios, strict=True))
    scaled = [
        {name: value * ratio for name, value in end.items()} if ratio != 1 else end
        for end, ratio in zip(ends, ratios, strict=True)
    ]
    mean = weighted_mean(scaled, counts)
    return {name: value.add_(start[name], alpha=rest) for name, value in mean.items()} if rest else mean
