"""FedDifRC (Wang et al., ICCV 2025, arXiv 2507.06482): a frozen diffusion model's representations guide training.

    L = L_method + lambda_tdcl * L_TDCL(z, F) + lambda_ndcr * L_NDCR(z, H)

With FedAvg as the method this is the paper's; the terms go on top of any other method as well. F are the prompted and
H the denoising representations of the same image, read from the cache. Both are energies: non-negative and nearly
parallel between images. A target is therefore taken as it is ("raw"), with the mean subtracted ("centred"), or with
the mean subtracted and divided by the standard deviation per dimension ("standardised"); mean and deviation are those
of the denoising representations on the basis images. In the paper the condition of F is the local model's own feature
and so moves every round; a cache cannot hold that: F is static.

The targets are frozen, so choosing layers, scaling and normalising them is done once, by `prepare`, and not at every
step; the price is that they are held as float32, twice the cache's size.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.settings.params import Guidance as GuidanceParams
from stages.train_fl import losses
from stages.train_fl.client_data import Guidance

_ROWS = 1024


class GuidanceLoss:
    """The two terms, each switched off by weight 0, on targets from `prepare`."""

    def __init__(self, params: GuidanceParams) -> None:
        """Weights, temperature and forms from `params`."""
        self._params = params

    def __call__(self, embeddings: Tensor, targets: Guidance) -> dict[str, Tensor]:
        """Embeddings float (B, D) in the space of the targets -> the terms that are on, weighted, by name."""
        params, terms = self._params, {}
        if params.tdcl_weight > 0:
            terms["tdcl"] = params.tdcl_weight * losses.tdcl_loss(
                embeddings,
                targets.prompted,
                targets.positive,
                params.temperature,
                params.tdcl_normalisation,
                prompted_is_unit=True,
            )
        if params.ndcr_weight > 0:
            terms["ndcr"] = params.ndcr_weight * losses.ndcr_loss(
                embeddings, targets.denoised, params.ndcr_form, denoised_is_unit=params.ndcr_form != "l2"
            )
        return terms


def columns(params: GuidanceParams, layers: Mapping[str, Sequence[int]]) -> list[int]:
    """The columns of the layers that guide; their number is the targets' length.

    Args:
        params: `layers` is "all" or names.
        layers: of the feature set: name -> [first column, one past its last].

    Raises:
        PipelineError: the set has no layer of that name, or none is named.
    """
    names = list(layers) if params.layers == "all" else params.layers
    unknown = [name for name in names if name not in layers]
    if unknown or not names:
        what = f"names {', '.join(unknown)}" if unknown else "names no layer"
        raise PipelineError(f"guidance.layers {what}; the feature set has {', '.join(layers)}: use these, or all")
    return [column for name in dict.fromkeys(names) for column in range(*layers[name])]


def prepare(
    cached: Guidance,
    params: GuidanceParams,
    layers: Mapping[str, Sequence[int]],
    mean: Tensor,
    std: Tensor,
) -> Guidance:
    """The targets of training: the layers that guide, scaled, of unit length (but for NDCR's form "l2").

    Args:
        cached: denoised float16 (n, D), prompted float16 (n, P, D).
        params: which layers, scales and form; a representation that no term uses becomes empty: (n, 0).
        layers: of the feature set: name -> [first column, one past its last].
        mean: float (D,), of the feature set.
        std: float (D,); a dimension that never varies (at most 1e-6) is left unscaled.

    Returns:
        denoised float32 (n, d), prompted float32 (n, P, d), d columns.
    """
    keep = torch.tensor(columns(params, layers), device=cached.denoised.device)
    mean, std = mean.float()[keep], std.float()[keep]
    std = torch.where(std > 1e-6, std, torch.ones_like(std))

    def scaled(values: Tensor, scale: str, unit_length: bool) -> Tensor:
        out = torch.empty((*values.shape[:-1], len(keep)), device=values.device)
        for start in range(0, len(values), _ROWS):  # a few rows at a time: the temporary copies stay small
            rows = values[start : start + _ROWS].index_select(-1, keep).float()
            if scale != "raw":
                rows = rows - mean
            if scale == "standardised":
                rows = rows / std
            out[start : start + _ROWS] = losses.unit(rows) if unit_length else rows
        return out

    nothing = torch.empty(len(cached.positive), 0, device=cached.denoised.device)
    prompted = scaled(cached.prompted, params.tdcl_targets, True) if params.tdcl_weight > 0 else nothing
    unit_length = params.ndcr_form != "l2"
    denoised = scaled(cached.denoised, params.ndcr_targets, unit_length) if params.ndcr_weight > 0 else nothing
    return Guidance(denoised, prompted, cached.positive)
