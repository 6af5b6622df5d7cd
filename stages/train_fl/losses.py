"""FedDifRC's two losses (Wang et al., ICCV 2025) as pure functions of tensors.

Both compare a sample's embedding z_i with that sample's own cached representations, and only with those: the authors'
code pairs embeddings with other samples' negatives, which makes the loss change when a batch is permuted.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Normalisation = Literal["none", "representation", "scalar"]


def tdcl_loss(
    embeddings: Tensor,
    prompted: Tensor,
    positive: Tensor,
    temperature: float,
    normalisation: Normalisation = "none",
) -> Tensor:
    """Text-driven contrastive learning.

    mean_i log(1 + sum_j exp(s(z_i, F_ij) / tau) / exp(s(z_i, F_i+) / tau)), which is the cross-entropy of the
    similarities to the sample's own prompted representations with the matching prompt as the right class.

    Args:
        embeddings: float (B, D).
        prompted: float (B, P, D), the sample's representation under each prompt; receives no gradient.
        positive: int64 (B,), which of the P prompts matches.
        temperature: tau > 0; the authors use 0.04.
        normalisation: what divides the cosine similarity. "none": nothing, as in the authors' code.
            "representation": U(F), the mean distance of all the batch's unit embeddings to the unit representation F
            (paper). "scalar": the mean of U over all of the batch's representations.

    Returns:
        The mean over the batch, scalar, in [0, inf); log(P) if all representations are equal.
    """
    z = functional.normalize(embeddings, dim=1)
    f = functional.normalize(prompted, dim=2)
    similarity = torch.einsum("bd,bpd->bp", z, f)
    if normalisation != "none":
        distance = torch.cdist(z.detach(), f.flatten(0, 1)).mean(0).view_as(similarity)  # U(F_bp)
        if normalisation == "scalar":
            distance = distance.mean()
        similarity = similarity / distance.clamp_min(1e-6)
    return functional.cross_entropy(similarity / temperature, positive)


def ndcr_loss(embeddings: Tensor, denoised: Tensor) -> Tensor:
    """Noise-driven consistency regularisation.

    mean_i sum_q (z_iq - H_iq)^2 with z_i and H_i scaled to unit length (paper's L2 form), that is 2 - 2 cos(z_i, H_i).
    The authors' code takes the KL divergence of softmaxes of the same unit vectors instead, whose gradient is a
    thousandth of this at D = 512.

    Args:
        embeddings: float (B, D).
        denoised: float (B, D); receives no gradient.

    Returns:
        The mean over the batch, scalar, in [0, 4].
    """
    z = functional.normalize(embeddings, dim=1)
    h = functional.normalize(denoised, dim=1)
    return (z - h).square().sum(1).mean()
