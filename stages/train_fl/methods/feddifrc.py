"""FedDifRC (Wang et al., ICCV 2025, https://arxiv.org/abs/2507.06482): diffusion representations guide training.

    L = L_method + lambda_tdcl * L_TDCL(z, F) + lambda_ndcr * L_NDCR(z, H)

With FedAvg as the method this is the paper's algorithm; a `guidance` section adds the terms to any other method. F are
the prompted and H the denoising representations of the same image under a frozen diffusion model, read from the cache
(`guidance`). In the paper F is conditioned on the local model's own feature, which changes every round; a cache cannot
follow it, so F is static.
"""

from typing import Literal

from torch import Tensor

from pipeline.settings.params import Guidance
from stages.train_fl import losses
from stages.train_fl.guidance import GuidanceTargets
from stages.train_fl.methods.fedavg import FedAvg


class FedDifRC(FedAvg):
    """FedAvg guided by a frozen diffusion model: TDCL and NDCR, which local SGD adds to the cross-entropy."""

    class Settings(Guidance):  # type: ignore[assignment]  # the weights and targets of the two losses
        """The values are the authors' code's; see `Guidance`."""

        algorithm: Literal["feddifrc"] = "feddifrc"

    sends_only_weights = True
    capturable = True


class GuidanceLoss:
    """FedDifRC's two terms, each disabled by weight 0, on targets from `guidance.prepare`."""

    def __init__(self, settings: Guidance) -> None:
        """Use the weights, temperature and forms of `settings`."""
        self._settings = settings

    def __call__(self, embeddings: Tensor, targets: GuidanceTargets) -> dict[str, Tensor]:
        """Compute the enabled terms, weighted, by name, from embeddings float (B, D) in the space of the targets."""
        settings, terms = self._settings, {}
        if settings.tdcl_weight > 0:
            temperature, normalisation = settings.temperature, settings.tdcl_normalisation
            loss = losses.tdcl_loss(embeddings, targets.prompted, targets.positive, temperature, normalisation, True)
            terms["tdcl"] = settings.tdcl_weight * loss
        if settings.ndcr_weight > 0:
            form = settings.ndcr_form
            loss = losses.ndcr_loss(embeddings, targets.denoised, form, denoised_is_unit=form != "l2")
            terms["ndcr"] = settings.ndcr_weight * loss
        return terms
