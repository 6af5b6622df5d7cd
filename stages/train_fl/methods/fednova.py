"""FedNova (Wang et al., NeurIPS 2020, https://arxiv.org/abs/2007.07481): steps are normalised before averaging.

    client i:  y_i <- SGD(x), so that x - y_i = lr * sum_k a_ik g_ik;   sends ||a_i||_1
    server:    x <- x - tau_eff * sum_i p_i (x - y_i) / ||a_i||_1
               tau_eff = sum_i p_i ||a_i||_1,   p_i = n_i / sum_j n_j

A client that takes more steps thus does not pull harder. p_i is over the round's participants. The recursion behind
||a||_1 holds because every round starts with an empty momentum buffer.

Differences from the authors' code:

- ||a||_1 follows the optimiser's own recursion, for momentum and proximal term together. The official code adds the
  proximal term to the momentum buffer in place and mixes both recursions: it divides by 7.999 where the update's
  coefficients sum to 5.3725 (3 steps, momentum 0.9, lr*mu 0.05).
- tau_eff is the same sum with a proximal term; the official code then uses the mean number of steps.
- Only parameters are normalised. The coefficients p_i tau_eff / ||a_i|| do not sum to one, and would turn BatchNorm
  variances of (0.05, 0.9, 1.0) into -6.4; buffers are averaged as in FedAvg.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from pipeline.settings.params import MethodSettings
from stages.train_fl.client_data import Batches
from stages.train_fl.methods.arithmetic import normaliser, server_momentum_step, weighted_mean
from stages.train_fl.methods.fedprox import FedProx
from stages.train_fl.methods.state import ClientState, ClientUpdate, Metrics, ServerState, Weights


class FedNova(FedProx):
    """FedNova; with `proximal_mu` > 0 its local solver is FedProx's."""

    class Settings(MethodSettings):
        """The values are the authors'; `server_momentum` is their gmf."""

        algorithm: Literal["fednova"] = "fednova"
        proximal_mu: float = Field(0.0, ge=0, description="FedProx's term in the local objective; 0 is plain SGD")
        server_momentum: float = Field(0.0, ge=0, lt=1, description="momentum of the server's step")

    capturable = True

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Run local SGD; send the sum of its gradients' coefficients, float64 ()."""
        update, state, metrics = super().client_update(weights, broadcast, state, batches, learning_rate)
        steps = normaliser(update.num_steps, self.local_sgd.momentum, learning_rate * self.settings.proximal_mu)
        return replace(update, extras={"normaliser": torch.tensor(steps, dtype=torch.float64)}), state, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """Take the normalised mean, then the server's momentum if there is one."""
        start, counts = self._parameters(state.weights), [update.num_samples for update in updates]
        ends = [self._parameters(update.weights) for update in updates]
        steps = [float(update.extras["normaliser"]) for update in updates]
        parameters, velocity = normalised_mean(start, ends, counts, steps), state.private
        if momentum := self.settings.server_momentum:
            parameters, velocity = server_momentum_step(start, parameters, velocity, momentum, 1.0)
        return ServerState(self._average(updates, "samples") | parameters, private=velocity), {}


def normalised_mean(
    start: Weights, ends: Sequence[Weights], counts: Sequence[float], normalisers: Sequence[float]
) -> Weights:
    """Compute the server's step, x - tau_eff sum_i p_i (x - y_i) / a_i with tau_eff = sum_i p_i a_i; no buffers.

    x (`start`) are the parameters that clients started from; y_i (`ends`), n_i (`counts`) and a_i > 0 (`normalisers`)
    are per participant. Computed as sum_i p_i r_i y_i + (1 - sum_i p_i r_i) x with r_i = tau_eff / a_i. With equal a_i
    every r_i is exactly 1 and the result is `weighted_mean`, to the byte.
    """
    total = sum(counts)
    ratios = [sum(n * (a / own) for n, a in zip(counts, normalisers, strict=True)) / total for own in normalisers]
    rest = sum(n / total * (1 - ratio) for n, ratio in zip(counts, ratios, strict=True))
    scaled = ({name: value * ratio for name, value in end.items()} for end, ratio in zip(ends, ratios, strict=True))
    mean = weighted_mean(scaled, counts)
    return {name: value.add_(start[name], alpha=rest) for name, value in mean.items()} if rest else mean
