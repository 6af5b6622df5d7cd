"""Measure how far an image's matching prompt is from the others, as TDCL needs it (FedDifRC, ICCV 2025).

TDCL compares an embedding z_i with the prompt-conditioned representations of its own image by the cosine s. Here the
image's denoising representation H_i takes the place of z_i, which NDCR pulls towards it:

    s_ic      = cos(H_i, F_ic)
    margin_i  = s_i,y - mean over the non-matching prompts j of s_ij
    hardest_i = s_i,y - max  over the non-matching prompts j of s_ij

y is the prompt that matches image i, and j runs over its negatives. A margin above 0 on average means that prompts
separate classes. `matching_nearest` is the share of images with hardest_i > 0, one in P by chance, and `nearest_error`
its standard error. The differences come from the text alone, because all prompts of an image share its noise.
`separation`, the mean over j of 1 - cos(F_i,y, F_ij), measures how far the text moves a representation.
"""

from dataclasses import dataclass

import numpy as np

from stages.analyze_features.probes import standard_error

_BLOCK = 256  # images converted to float64 at a time
_DIGITS = 6


@dataclass(frozen=True)
class Similarities:
    """Cosines of each of n images' P prompted representations, float64 (n, P): to H_i, and to the matching one."""

    to_denoised: np.ndarray
    to_matching: np.ndarray
    positive: np.ndarray  # int64 (n,), columns of the matching prompts

    def margins(self) -> np.ndarray:
        """Return margin_i, float64 (n,)."""
        own, others = self._own_and_others(self.to_denoised)
        return own - others.mean(1)

    def means(self, images: np.ndarray) -> dict[str, float]:
        """Return the quantities above by name, as means over the images that a mask, bool (n,), selects."""
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
        """Return the column of the prompt nearest to H_i, int64 (n,), ties to the first."""
        return self.to_denoised.argmax(1)

    def _own_and_others(self, cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) of the matching prompts and (n, P - 1) of the others."""
        matching = np.arange(cosines.shape[1]) == self.positive[:, None]  # (n, P)
        return cosines[matching], cosines[~matching].reshape(len(cosines), -1)


def similarities(denoised: np.ndarray, prompted: np.ndarray, positive: np.ndarray) -> Similarities:
    """Compare images, float (n, D), with their prompts, float (n, P, D), P >= 2, of which `positive` (n,) match."""
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
    """Return the share of each class's images whose nearest prompt is each prompt: float64 (K, num_prompts).

    `nearest` (n,) are columns of `prompt_class` (n, P), the numbers of each image's prompts. The share is NaN if no
    image of the class has the prompt; the rest of a row sums to 1.
    """
    counts, compared = np.zeros((2, num_classes, num_prompts))
    np.add.at(counts, (labels, prompt_class[np.arange(len(labels)), nearest]), 1)
    np.add.at(compared, (labels[:, None], prompt_class), 1)
    return np.where(compared > 0, counts / np.maximum(counts.sum(1, keepdims=True), 1), np.nan)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
