"""How far an image's matching prompt sits from the others: what TDCL has to work with (FedDifRC, ICCV 2025).

TDCL compares an embedding z_i with the prompt-conditioned representations of its own image by the cosine s. Here the
image's denoising representation H_i stands in for z_i, which NDCR pulls towards it:

    s_ic      = cos(H_i, F_ic)
    margin_i  = s_i,y - mean over the non-matching prompts j of s_ij
    hardest_i = s_i,y - max  over the non-matching prompts j of s_ij

y the prompt that matches image i, j over that image's own negatives. A margin above 0 on average means that the prompts
tell classes apart; `matching_nearest` is the share of images with hardest_i > 0, one in P if they tell nothing. Both
are of the text alone: the noise is the same for all of an image's prompts. `nearest_error` is the standard error of
`matching_nearest`. Apart from H_i, `separation` is
mean over j of 1 - cos(F_i,y, F_ij): how far the text moves a representation at all.
"""

from dataclasses import dataclass

import numpy as np

from stages.analyze_features.probes import standard_error

_BLOCK = 256  # images made float64 at a time
_DIGITS = 6


@dataclass(frozen=True)
class Similarities:
    """Cosines of each of n images' P prompted representations, float64 (n, P): to H_i, and to the matching one."""

    to_denoised: np.ndarray
    to_matching: np.ndarray
    positive: np.ndarray  # int64 (n,), which of the P prompts matches

    def margins(self) -> np.ndarray:
        """float64 (n,): margin_i."""
        own, others = self._own_and_others(self.to_denoised)
        return own - others.mean(1)

    def means(self, images: np.ndarray) -> dict[str, float]:
        """The quantities above by name, means over the images chosen by bool (n,)."""
        own, others = self._own_and_others(self.to_denoised)
        hardest = (own - others.max(1))[images]
        nearest = float((hardest > 0).mean())
        found = {
            "margin": self.margins()[images].mean(),
            "hardest_margin": hardest.mean(),
            "matching_nearest": nearest,
            "nearest_error": standard_error(nearest, len(hardest)),
            "separation": 1 - self._own_and_others(self.to_matching)[1][images].mean(),
        }
        return {name: round(float(value), _DIGITS) for name, value in found.items()}

    def nearest(self) -> np.ndarray:
        """int64 (n,): which of its P prompts is nearest to H_i, ties to the first."""
        return self.to_denoised.argmax(1)

    def _own_and_others(self, cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) of the matching prompts and (n, P - 1) of the others."""
        matching = np.arange(cosines.shape[1]) == self.positive[:, None]  # (n, P)
        return cosines[matching], cosines[~matching].reshape(len(cosines), -1)


def similarities(denoised: np.ndarray, prompted: np.ndarray, positive: np.ndarray) -> Similarities:
    """Compares every image with its own prompts.

    Args:
        denoised: float (n, D).
        prompted: float (n, P, D), P >= 2.
        positive: int64 (n,), which of the P prompts matches.
    """
    to_denoised, to_matching = np.empty(prompted.shape[:2]), np.empty(prompted.shape[:2])
    for start in range(0, len(denoised), _BLOCK):
        rows = slice(start, start + _BLOCK)
        unit_prompted = _unit(prompted[rows])  # (b, P, D)
        matching = unit_prompted[np.arange(len(unit_prompted)), positive[rows]]  # (b, D)
        to_denoised[rows] = np.einsum("bd,bpd->bp", _unit(denoised[rows]), unit_prompted)
        to_matching[rows] = np.einsum("bd,bpd->bp", matching, unit_prompted)
    return Similarities(to_denoised, to_matching, positive)


def confusion(
    nearest: np.ndarray, prompt_class: np.ndarray, labels: np.ndarray, num_classes: int, num_prompts: int
) -> np.ndarray:
    """Share of each class's images whose nearest prompt is each prompt.

    Args:
        nearest: int64 (n,), which of its P prompts is nearest to an image.
        prompt_class: int (n, P), the numbers of each image's prompts.
        labels: int64 (n,).
        num_classes: K.
        num_prompts: how many prompts the feature set has.

    Returns:
        float64 (K, num_prompts); NaN where none of the class's images has the prompt among its own, the rest of a row
        sums to 1.
    """
    counts, compared = np.zeros((2, num_classes, num_prompts))
    np.add.at(counts, (labels, prompt_class[np.arange(len(labels)), nearest]), 1)
    np.add.at(compared, (labels[:, None], prompt_class), 1)
    return np.where(compared > 0, counts / np.maximum(counts.sum(1, keepdims=True), 1), np.nan)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
