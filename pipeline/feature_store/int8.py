"""Representations as 8-bit integers: half the bytes of float16.

Every dimension has a scale of its own, symmetric around its mean on the basis images:

    stored = round((value - mean) / step), from -127 to 127;  step = 12 standard deviations / 127

Twelve standard deviations, because representations under other prompts lie further out than those of the basis images,
whose scale this is; what lies beyond is clipped. What it costs is measured in docs/scale.md.
"""

import numpy as np

from pipeline.feature_store.schema import Basis

_LARGEST = 127
_DEVIATIONS = 12.0
_LEAST = 1e-3  # of the mean: the range of a dimension that is constant on the basis images


class Int8:
    """The scales of one set."""

    def __init__(self, basis: Basis) -> None:
        """Take mean and standard deviation of each dimension from the set's basis."""
        self._mean = basis.mean.astype(np.float32)  # (D,)
        widest = np.maximum(_DEVIATIONS * basis.std, _LEAST * np.abs(basis.mean))
        self._step = np.where(widest > 0, widest / _LARGEST, 1.0).astype(np.float32)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Round finite numbers (..., D) to int8."""
        scaled = np.rint((values.astype(np.float32) - self._mean) / self._step)
        return np.clip(scaled, -_LARGEST, _LARGEST).astype(np.int8)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Return the float16 numbers of int8 (..., D)."""
        return (stored * self._step + self._mean).astype(np.float16)
