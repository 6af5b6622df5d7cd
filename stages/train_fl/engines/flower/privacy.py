"""Differential privacy of the nodes' updates, with Flower's own mods, as `federation.differential_privacy` asks for.

    central   fixedclipping_mod on the node, DifferentialPrivacyClientSideFixedClipping around the Strategy
    local     LocalDpMod on the node; two clipped updates differ by at most twice the norm, which is the sensitivity

The noise of LocalDpMod follows a formula that holds only for epsilon below 1, so it is given a sensitivity that makes
its noise that of the analytic Gaussian mechanism (Balle and Wang, ICML 2018, https://arxiv.org/abs/1805.06530).

Both protect one set of weights whose mean the server takes. They are therefore limited to methods that send nothing
else, and to networks without BatchNorm, whose variances noise would make negative. They do not cover a node's number of
images, mean losses and accuracy.
"""

import math

from flwr.app import Context, Error, Message
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable
from torch import nn

from pipeline.errors import ConfigError, PipelineError
from pipeline.federation.node import REFUSED, config_of, node_of
from pipeline.settings.params import CentralPrivacy, LocalPrivacy
from stages.train_fl.session import Job


def check(job: Job, model: nn.Module) -> None:
    """Raise ConfigError if differential privacy is on but does not cover everything that the method sends."""
    if job.config.params.federation.differential_privacy is None:
        return
    if not job.method_class.sends_only_weights:
        raise ConfigError(
            f"federation.differential_privacy protects only weights, but methods.{job.method_name} sends or keeps "
            "more. Use a method that sends only weights (for example fedavg, moon or feddifrc), or set it to null."
        )
    if next(model.buffers(), None) is not None:
        raise ConfigError(
            "federation.differential_privacy does not work with BatchNorm's statistics. Set train_fl.normalisation to "
            "group."
        )


def protect(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Protect the node's training: a Flower mod."""
    try:
        federation = config_of(context.run_config, node_of(context).root).params.federation
    except PipelineError as error:
        return Message(Error(REFUSED, str(error)), reply_to=message)
    match federation.differential_privacy:
        case CentralPrivacy():
            return fixedclipping_mod(message, context, call_next)
        case LocalPrivacy(clipping_norm=norm, epsilon=epsilon, delta=delta):
            formula = math.sqrt(2 * math.log(1.25 / delta)) / epsilon  # what the mod multiplies its sensitivity by
            sensitivity = gaussian_deviation(2 * norm, epsilon, delta) / formula
            return LocalDpMod(norm, sensitivity, epsilon, delta)(message, context, call_next)
        case _:
            return call_next(message, context)


def gaussian_deviation(sensitivity: float, epsilon: float, delta: float) -> float:
    """Return the least standard deviation s of Gaussian noise that is (epsilon, delta)-private.

    The sensitivity D > 0 is the largest distance between two outcomes, epsilon > 0, and delta is in (0, 1).
    delta(s) = Phi(D / 2s - epsilon s / D) - e^epsilon Phi(-D / 2s - epsilon s / D) falls with s (Balle and Wang, ICML
    2018, theorem 8); s is found by bisection.
    """
    low, high = 1e-9, 1.0
    while gaussian_delta(high, epsilon) > delta:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, epsilon) > delta else (low, middle)
    return high * sensitivity


def gaussian_delta(deviation: float, epsilon: float) -> float:
    """Return the delta of noise with this standard deviation, for a sensitivity of 1."""
    from scipy.special import log_ndtr

    near, far = 0.5 / deviation - epsilon * deviation, -0.5 / deviation - epsilon * deviation
    return math.exp(log_ndtr(near)) - math.exp(epsilon + log_ndtr(far))
