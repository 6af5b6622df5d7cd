"""FedAvgM (Hsu et al., 2019): FedAvg with momentum on the server.

    server:  v <- beta v + (x - mean_k y_k);   x <- x - eta v        mean by samples, v = 0 at first

This is the paper's heavy ball; MOON's code takes an exponential mean, v <- beta v + (1 - beta) delta, which is the same
with eta divided by 1 / (1 - beta). v covers trained parameters; buffers are averaged plainly.
"""

from stages.train_fl.methods.base import ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.methods.fedavg import FedAvg, subtract
from stages.train_fl.methods.local_sgd import LocalSGD


class FedAvgM(FedAvg):
    """FedAvgM."""

    def __init__(self, local_sgd: LocalSGD, server_momentum: float, server_learning_rate: float) -> None:
        """Takes beta in [0, 1), 0.9 in the paper, and eta > 0, 1 in the paper."""
        super().__init__(local_sgd)
        self._momentum = server_momentum
        self._learning_rate = server_learning_rate

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """The momentum step towards the participants' mean."""
        average = self._average(updates, "samples")
        parameters, velocity = server_momentum_step(
            self._parameters(state.weights),
            self._parameters(average),
            state.private,
            self._momentum,
            self._learning_rate,
        )
        return ServerState(average | parameters, private=velocity), {}


def server_momentum_step(
    start: Weights, mean: Weights, velocity: Weights, momentum: float, learning_rate: float
) -> tuple[Weights, Weights]:
    """The heavy ball: v' = beta v + (x - mean), x' = x - eta v'.

    Written as x' = eta mean + (1 - eta) x - eta beta v, so that beta = 0 and eta = 1 give the mean to the byte.

    Args:
        start: x, the parameters that clients started from.
        mean: what FedAvg would make of them.
        velocity: v; empty stands for zero.
        momentum: beta.
        learning_rate: eta.

    Returns:
        x' and v'.
    """
    step = subtract(start, mean)
    parameters = relax(start, mean, learning_rate)
    if not (velocity and momentum):
        return parameters, step
    for name, value in velocity.items():
        step[name].add_(value, alpha=momentum)
        parameters[name] = parameters[name] - (learning_rate * momentum) * value
    return parameters, step


def relax(start: Weights, target: Weights, learning_rate: float) -> Weights:
    """Moves by x + eta (target - x); the target itself where eta is 1."""
    if learning_rate == 1:
        return dict(target)
    return {name: start[name].lerp(value, learning_rate) for name, value in target.items()}
