"""The losses of the methods as pure functions of tensors, each the mean over the batch.

FedDifRC's two losses (Wang et al., ICCV 2025, https://arxiv.org/abs/2507.06482) compare a sample's embedding z_i only
with that sample's own cached representations. The authors' code pairs embeddings with other samples' negatives, which
makes the loss change when a batch is permuted.

Embeddings z are float (B, D), one row per sample, and every loss is a scalar tensor. a^ is a / max(|a|, 1e-12), so that
a dead embedding (all zeros) gives no NaN, as it does in that code.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Normalisation = Literal["none", "representation", "scalar"]
NDCRForm = Literal["normalised-l2", "l2", "kl"]


def unit(vectors: Tensor) -> Tensor:
    """Float (..., D) -> the same directions with length 1; a zero vector stays zero."""
    return functional.normalize(vectors, dim=-1)


def tdcl_loss(
    embeddings: Tensor,
    prompted: Tensor,
    positive: Tensor,
    temperature: float = 0.04,
    normalisation: Normalisation = "none",
    prompted_is_unit: bool = False,
) -> Tensor:
    """Compute FedDifRC's text-driven contrastive loss (TDCL).

    mean_i log(1 + sum_j exp(s(z_i, F_ij) / tau) / exp(s(z_i, F_i+) / tau)), which is the cross-entropy of the
    similarities to the sample's own prompted representations with the matching prompt as the right class.

    Args:
        embeddings: float (B, D).
        prompted: Representations of each sample under its prompts, float (B, P, D); receives no gradient.
        positive: Which of the P prompts matches, int64 (B,).
        temperature: tau > 0; the default is the authors'.
        normalisation: What divides the cosine similarity. "none": nothing, as in the authors' code.
            "representation": U(F), the mean distance of all the batch's unit embeddings to the unit representation F
            (paper; that it is taken per representation and passes no gradient is our reading), at least 1e-6.
            "scalar": the mean of U over all of the batch's representations.
        prompted_is_unit: `prompted` already has length 1 in D and is not normalised again.

    Returns:
        Scalar in [0, inf); log(P) if all representations are equal.
    """
    z = unit(embeddings)
    f = prompted if prompted_is_unit else unit(prompted)
    similarity = torch.einsum("bd,bpd->bp", z, f)
    if normalisation != "none":
        distance = torch.cdist(z.detach(), f.flatten(0, 1)).mean(0).view_as(similarity)  # U(F_bp)
        if normalisation == "scalar":
            distance = distance.mean()
        similarity = similarity / distance.clamp_min(1e-6)
    return functional.cross_entropy(similarity / temperature, positive)


def ndcr_loss(
    embeddings: Tensor, denoised: Tensor, form: NDCRForm = "normalised-l2", denoised_is_unit: bool = False
) -> Tensor:
    """Compute FedDifRC's noise-driven consistency regularisation (NDCR).

    Args:
        embeddings: float (B, D).
        denoised: float (B, D); receives no gradient.
        form: "normalised-l2": sum_q (z^_iq - H^_iq)^2 = 2 - 2 cos(z_i, H_i), the paper's L2 form on unit vectors.
            "l2": sum_q (z_iq - H_iq)^2, the paper's form to the letter; needs targets of order 1.
            "kl": KL(softmax(H^_i) || softmax(z^_i)), as in the authors' code; softmax of a unit vector is almost
            uniform, so value and gradient are a thousandth of the first form's at D = 512.
        denoised_is_unit: `denoised` already has length 1 and is not normalised again.

    Returns:
        Scalar, at least 0; at most 4 in the first form.
    """
    if form == "l2":
        return (embeddings - denoised).square().sum(1).mean()
    z = unit(embeddings)
    h = denoised if denoised_is_unit else unit(denoised)
    if form == "kl":
        return functional.kl_div(z.log_softmax(1), h.softmax(1), reduction="batchmean")
    return (z - h).square().sum(1).mean()


def moon_loss(embeddings: Tensor, global_embeddings: Tensor, previous_embeddings: Tensor, temperature: float) -> Tensor:
    """Compute MOON's model-contrastive loss with one previous model (Li et al., CVPR 2021, equation 3).

    mean_i -log(e^{g_i/T} / (e^{g_i/T} + e^{p_i/T})), in (0, inf), with g_i and p_i the cosines of z_i to the embeddings
    of the same image by the global and the client's previous model, float (B, D), which receive no gradient. Computed
    as softplus((p_i - g_i) / T). The authors use T = 0.5; at infinity the loss is log 2 and its gradient exactly zero.
    """
    z = unit(embeddings)
    difference = (z * (unit(previous_embeddings) - unit(global_embeddings))).sum(1)
    return functional.softplus(difference / temperature).mean()


def prototype_loss(embeddings: Tensor, labels: Tensor, prototypes: Tensor, known: Tensor) -> Tensor:
    """Compute FedProto's distance to the class's global prototype: mean over B and D of (z_i - C_{y_i})^2.

    Labels y are int64 (B,), prototypes C float (K, D), constant. `known`, bool (K,), marks the classes that have one;
    samples of the others add 0 to the mean, as in the authors' code.
    """
    difference = (embeddings - prototypes[labels]) * known[labels, None]
    return difference.square().mean()


def gaussian_kl(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """Compute KL(N(mean, std^2) || N(other_mean, other_std^2)), summed over D and averaged over B.

    All are float (B, D), deviations positive. FedCR calls it with the class's prior first and the encoder second, as
    its authors' code does in training; the bound it is derived from has them the other way round, which would explode
    as the prior's deviation shrinks.
    """
    ratio = (std / other_std).square()
    shift = ((mean - other_mean) / other_std).square()
    return 0.5 * (ratio + shift - 1 - ratio.log()).sum(1).mean()
