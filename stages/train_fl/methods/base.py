"""What a federated method is: pure functions with explicit state (after FedJAX's shape).

An engine holds the states and calls the functions; nothing here knows whether clients run in turn in one process or
on many machines. Weights are a model's whole state dict: parameters and buffers.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from stages.train_fl.client_data import Batches

Weights = dict[str, Tensor]
Metrics = dict[str, float]


@dataclass(frozen=True)
class ServerState:
    """The global weights, and what else the server sends to clients or keeps between rounds (by name)."""

    weights: Weights
    broadcast: Weights = field(default_factory=dict)
    private: Weights = field(default_factory=dict)


ClientState = Weights
"""What a client keeps between the rounds it takes part in; empty for methods without client state."""


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends back: its weights after local training, its number of samples and of optimiser steps."""

    weights: Weights
    num_samples: int
    num_steps: int


class Method(Protocol):
    """A federated method."""

    def init_server(self, weights: Weights) -> ServerState:
        """The server's state before the first round."""

    def init_client(self, weights: Weights) -> ClientState:
        """A client's state before it first takes part."""

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Local training from the global weights at this round's learning rate; changes none of its arguments."""

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """Aggregation of one round's updates; changes none of its arguments."""
