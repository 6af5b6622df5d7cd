"""The data of a method: weights, server and client state, and client updates.

Weights are a model's complete state dict: parameters and buffers. All state is named tensors, so that it can be written
to safetensors or sent as arrays.
"""

from dataclasses import dataclass, field

from torch import Tensor

Weights = dict[str, Tensor]
Metrics = dict[str, float]

ClientState = Weights
"""A client's state between its rounds. Empty for methods without client state, and before a client's first round."""


@dataclass(frozen=True)
class ServerState:
    """The weights clients start from, and by name what else the server sends (`broadcast`) or keeps (`private`)."""

    weights: Weights
    broadcast: Weights = field(default_factory=dict)
    private: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class ClientUpdate:
    """A client's weights after local training, its number of samples and of optimiser steps.

    `extras` holds what else the method sends, such as control variates, or prototypes and their counts.
    """

    weights: Weights
    num_samples: int
    num_steps: int
    extras: Weights = field(default_factory=dict)
