"""Differential privacy and secure aggregation of what nodes send: Flower's own mods, as `federation` asks for them.

    central   fixedclipping_mod on the node, DifferentialPrivacyClientSideFixedClipping around the Strategy
    local     LocalDpMod on the node; a clipped update differs from another by at most twice the norm: its sensitivity
              (told a noise that holds for every epsilon: Balle and Wang, ICML 2018; Flower's own formula does below 1)
    SecAgg+   secaggplus_mod on the node, SecAggPlusWorkflow on the server (see `secure`)

All of them protect one set of weights, whose mean the server takes. So they go with methods that send nothing else
and whose server does nothing else, and with networks without BatchNorm, whose variances noise would make negative.
What they do not cover: a node's number of images, its mean losses and accuracy, which it sends in the clear.
"""

import math

from flwr.app import Context, Error, Message
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable
from torch import nn

from pipeline.errors import PipelineError
from pipeline.federation.node import REFUSED, config_of, node_of
from pipeline.settings.params import METHODS, CentralPrivacy, Federation, LocalPrivacy
from stages.train_fl.methods import method_class
from stages.train_fl.run import Job


def check(job: Job, model: nn.Module) -> None:
    """Checks that what params.yaml asks for covers all that the method sends.

    Raises:
        PipelineError: it does not.
    """
    params = job.config.params.federation
    wanted = [key for key in ("differential_privacy", "secure_aggregation") if getattr(params, key) is not None]
    if not wanted:
        return
    asked = f"federation.{wanted[0]}"
    if len(wanted) > 1:
        raise PipelineError(f"federation.{wanted[0]} and federation.{wanted[1]} do not go together here: choose one")
    if params.secure_aggregation and min(params.min_clients, job.config.params.train_fl.clients_per_round) < 2:
        raise PipelineError(
            f"{asked} hides a node among others: set federation.min_clients and clients_per_round to 2 or more"
        )
    if not method_class(job.method).sends_only_weights:
        covered = [name for name, settings in METHODS.items() if method_class(settings()).sends_only_weights]
        raise PipelineError(
            f"{asked} covers the mean of weights alone, but {job.method.model_dump()['algorithm']} sends or keeps "
            f"more: use one of {', '.join(covered)}, or set it to null"
        )
    if next(model.buffers(), None) is not None:
        raise PipelineError(f"{asked} does not go with BatchNorm's statistics: set train_fl.normalisation to group")


def protect(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The node's side, around its training."""
    try:
        params = _federation(context)
        match params.differential_privacy:
            case CentralPrivacy():
                return fixedclipping_mod(message, context, call_next)
            case LocalPrivacy(clipping_norm=norm, epsilon=epsilon, delta=delta):
                formula = math.sqrt(2 * math.log(1.25 / delta)) / epsilon  # what the mod multiplies its sensitivity by
                sensitivity = gaussian_deviation(2 * norm, epsilon, delta) / formula
                return LocalDpMod(norm, sensitivity, epsilon, delta)(message, context, call_next)
        if params.secure_aggregation is not None:
            from stages.train_fl.engines.flower import secure

            return secure.protect(message, context, call_next)
    except PipelineError as error:
        return Message(Error(REFUSED, str(error)), reply_to=message)
    return call_next(message, context)


def gaussian_deviation(sensitivity: float, epsilon: float, delta: float) -> float:
    """The least deviation of Gaussian noise that is (epsilon, delta)-private: the analytic Gaussian mechanism.

    delta(s) = Phi(D / 2s - epsilon s / D) - e^epsilon Phi(-D / 2s - epsilon s / D), which falls with s (Balle and Wang,
    ICML 2018, theorem 8); found by bisection.

    Args:
        sensitivity: D > 0, the largest distance of two outcomes.
        epsilon: > 0.
        delta: in (0, 1).
    """
    low, high = 1e-9, 1.0
    while gaussian_delta(high, epsilon) > delta:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, epsilon) > delta else (low, middle)
    return high * sensitivity


def gaussian_delta(deviation: float, epsilon: float) -> float:
    """The delta that noise of this deviation gives, both for a sensitivity of 1."""
    from scipy.special import log_ndtr

    near, far = 0.5 / deviation - epsilon * deviation, -0.5 / deviation - epsilon * deviation
    return math.exp(log_ndtr(near)) - math.exp(epsilon + log_ndtr(far))


def _federation(context: Context) -> Federation:
    return config_of(context.run_config, node_of(context).root).params.federation
