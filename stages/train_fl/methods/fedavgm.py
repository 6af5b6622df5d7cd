"""FedAvgM (Hsu et al., 2019, https://arxiv.org/abs/1909.06335): FedAvg with momentum on the server.

    server:  v <- beta v + (x - mean_k y_k);   x <- x - eta v        mean by samples, v = 0 at first

This is the paper's heavy ball. MOON's code uses an exponential mean, v <- beta v + (1 - beta) delta, which is the same
with eta divided by 1 / (1 - beta). v covers the trained parameters; buffers are averaged as in FedAvg.
"""

from typing import Literal

from pydantic import Field

from pipeline.settings.params import MethodSettings
from stages.train_fl.methods.arithmetic import server_momentum_step
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.state import ClientUpdate, Metrics, ServerState


class FedAvgM(FedAvg):
    """FedAvg with server momentum."""

    class Settings(MethodSettings):
        """The values are the paper's."""

        algorithm: Literal["fedavgm"] = "fedavgm"
        server_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the server's step; 0 is FedAvg")
        server_learning_rate: float = Field(1.0, gt=0, description="the server's step")

    capturable = True

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """Step towards the participants' mean with momentum."""
        average = self._average(updates, "samples")
        start, mean = self._parameters(state.weights), self._parameters(average)
        coefficients = self.settings.server_momentum, self.settings.server_learning_rate
        parameters, velocity = server_momentum_step(start, mean, state.private, *coefficients)
        return ServerState(average | parameters, private=velocity), {}
