"""Arithmetic on named tensors that several methods share: means, steps, and the weight of momentum in them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from stages.train_fl.methods.state import Weights


def weighted_mean(weights: Iterable[Weights], counts: Sequence[float]) -> Weights:
    """Compute sum_k (n_k / sum_j n_j) w_k over floating entries; an integer or boolean entry is the first one's.

    All participants' weights have the same names and shapes; their numbers of samples, `counts`, are above 0. The
    participants are added in their order, one after the other, so an iterator needs the memory of one.
    """
    total = sum(counts)
    mean: Weights = {}
    for own, count in zip(weights, counts, strict=True):
        for name, value in own.items():
            if name not in mean:
                mean[name] = value * (count / total) if value.is_floating_point() else value.clone()
            elif value.is_floating_point():
                mean[name].add_(value, alpha=count / total)
    return mean


def subtract(minuend: Weights, subtrahend: Weights) -> Weights:
    """Compute minuend - subtrahend, over the names of the minuend."""
    return {name: value - subtrahend[name] for name, value in minuend.items()}


def relax(start: Weights, target: Weights, learning_rate: float) -> Weights:
    """Step to x + eta (target - x), which is the target itself if eta is 1."""
    if learning_rate == 1:
        return dict(target)  # not by lerp, whose rounding would change bytes
    return {name: start[name].lerp(value, learning_rate) for name, value in target.items()}


def server_momentum_step(
    start: Weights, mean: Weights, velocity: Weights, momentum: float, learning_rate: float
) -> tuple[Weights, Weights]:
    """Take a heavy-ball step: v' = beta v + (x - mean), x' = x - eta v'; return x' and v'.

    x (`start`) are the parameters that clients started from, `mean` those that FedAvg would give, v is empty for zero,
    beta the momentum and eta the learning rate. Computed as x' = eta mean + (1 - eta) x - eta beta v, so that beta = 0
    and eta = 1 give the mean to the byte.
    """
    step = subtract(start, mean)
    parameters = relax(start, mean, learning_rate)
    if not (velocity and momentum):
        return parameters, step
    for name, value in velocity.items():
        step[name].add_(value, alpha=momentum)
        parameters[name] = parameters[name] - (learning_rate * momentum) * value
    return parameters, step


def normaliser(num_steps: int, momentum: float, lr_mu: float = 0.0) -> float:
    """Sum the coefficients a_k in x - y = lr * sum_k a_k g_k after `num_steps` of SGD from x.

    The step is v <- momentum v + g + mu (y - x), y <- y - lr v with v = 0 at first. In units of lr, the distance s and
    the buffer u of a constant unit gradient obey u <- momentum u + 1 - lr_mu s, s <- s + u, and the sum is s. Closed
    forms for tau steps: tau; [tau - rho (1 - rho^tau) / (1 - rho)] / (1 - rho) with momentum rho; with `lr_mu`, the
    learning rate times proximal_mu, [1 - (1 - lr_mu)^tau] / lr_mu.
    """
    distance = buffer = 0.0
    for _ in range(num_steps):
        buffer = momentum * buffer + 1 - lr_mu * distance
        distance += buffer
    return distance


def proximal_penalty(parameters: list[Tensor], anchor: list[Tensor], mu: float) -> Tensor:
    """Compute mu/2 ||w - x||^2 over a list of tensors w and one of the same shapes x; a scalar."""
    differences = torch._foreach_sub(parameters, anchor)
    return 0.5 * mu * torch.stack(torch._foreach_norm(differences)).square().sum()


def add_proximal_gradient(gradients: list[Tensor], parameters: list[Tensor], anchor: list[Tensor], mu: float) -> None:
    """Add the gradient of `proximal_penalty` in place: gradients += mu (w - x)."""
    torch._foreach_add_(gradients, torch._foreach_sub(parameters, anchor), alpha=mu)
