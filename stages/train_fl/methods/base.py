"""What a federated method is: pure functions with explicit state (after FedJAX's shape).

An engine holds the states and calls the functions; nothing here knows whether clients run in turn in one process or
on many machines. Weights are a model's whole state dict: parameters and buffers. All state is named tensors, so that
it can be written to safetensors or sent as arrays.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from stages.train_fl.client_data import Batches

Weights = dict[str, Tensor]
Metrics = dict[str, float]


@dataclass(frozen=True)
class ServerState:
    """The weights clients start from, and what else the server sends to clients or keeps between rounds (by name)."""

    weights: Weights
    broadcast: Weights = field(default_factory=dict)
    private: Weights = field(default_factory=dict)


ClientState = Weights
"""What a client keeps between the rounds it takes part in; empty for methods without client state, and where a method
says so before the client's first round."""


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends back: its weights after local training, its number of samples and of optimiser steps.

    `extras` is what a method sends besides: control variates, prototypes and their counts.
    """

    weights: Weights
    num_samples: int
    num_steps: int
    extras: Weights = field(default_factory=dict)


class Method(Protocol):
    """A federated method."""

    def init_server(self, weights: Weights) -> ServerState:
        """The server's state before the first round."""

    def init_client(self, weights: Weights) -> ClientState:
        """A client's state before it first takes part."""

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Local training from the server's weights at this round's learning rate; changes none of its arguments."""

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """Aggregation of one round's updates; changes none of its arguments."""

    def reported_weights(self, state: ServerState) -> Weights:
        """The global model that is evaluated and saved; for all but FedDyn the weights clients start from."""
