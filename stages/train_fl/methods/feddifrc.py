"""FedDifRC (Wang et al., ICCV 2025, arXiv 2507.06482): FedAvg guided by a frozen diffusion model's representations.

    L = L_CE + lambda_tdcl * L_TDCL(z, F) + lambda_ndcr * L_NDCR(z, H)

F are the prompted and H the denoising representations of the same image, read from the cache. Both are energies:
non-negative and nearly parallel between images. A target is therefore taken as it is ("raw"), with the mean
subtracted ("centred"), or with the mean subtracted and divided by the standard deviation per dimension
("standardised"); mean and deviation are those of the denoising representations on the basis images. In the paper the
condition of F is the local model's own feature and so moves every round; a cache cannot hold that: F is static.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stages.train_fl import losses
from stages.train_fl.client_data import Batch
from stages.train_fl.methods.fedavg import FedAvg
from stages.train_fl.methods.local_sgd import LocalSGD

Scale = Literal["raw", "centred", "standardised"]


@dataclass(frozen=True)
class Targets:
    """Puts representations on a scale: (x - mean) / std; mean and std float32 (D,)."""

    mean: Tensor
    std: Tensor

    def __call__(self, representations: Tensor, scale: Scale) -> Tensor:
        """float16 (..., D) -> float32 (..., D)."""
        values = representations.float()
        if scale == "raw":
            return values
        centred = values - self.mean
        return centred if scale == "centred" else centred / self.std


@dataclass(frozen=True)
class GuidanceSettings:
    """The losses' weights (0 switches one off), TDCL's temperature and normalisation, and the targets' scales."""

    tdcl_weight: float
    tdcl_targets: Scale
    tdcl_normalisation: losses.Normalisation
    temperature: float
    ndcr_weight: float
    ndcr_targets: Scale


class FedDifRC(FedAvg):
    """FedAvg with TDCL and NDCR in the local objective; the server's side is FedAvg's."""

    def __init__(self, local_sgd: LocalSGD, settings: GuidanceSettings, targets: Targets) -> None:
        """Guides by `settings`."""
        super().__init__(local_sgd)
        self._settings = settings
        self._targets = targets

    def objective(self, embeddings: Tensor, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, and each guidance term that is switched on, already weighted."""
        terms = super().objective(embeddings, logits, batch)
        settings, guidance = self._settings, batch.guidance
        assert guidance is not None
        if settings.tdcl_weight > 0:
            prompted = self._targets(guidance.prompted, settings.tdcl_targets)
            terms["tdcl"] = settings.tdcl_weight * losses.tdcl_loss(
                embeddings, prompted, guidance.positive, settings.temperature, settings.tdcl_normalisation
            )
        if settings.ndcr_weight > 0:
            denoised = self._targets(guidance.denoised, settings.ndcr_targets)
            terms["ndcr"] = settings.ndcr_weight * losses.ndcr_loss(embeddings, denoised)
        return terms


def make_targets(mean: Tensor, std: Tensor) -> Targets:
    """Targets on this mean and standard deviation, float (D,); a dimension that never varies is left unscaled."""
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    return Targets(mean.float(), std.float())
