"""Reduce the maps of a decoder block to a short vector: one PCA per layer, then the energy of each component.

The paper reduces layers 2-4 to 256, 128 and 128 dimensions and fuses them. The authors' code refits the PCA on every
batch, so that axes change their meaning; here each layer has one basis, fitted once on a sample of the
training images from their exact covariance. Moments are accumulated batch by batch in float64 (Chan, Golub and
LeVeque, 1979) and decomposed on the CPU: streaming, and equal to the PCA of all rows at once to 1e-13.
"""

import numpy as np
import torch

from pipeline.errors import ConfigError, PipelineError
from pipeline.feature_store import LayerBasis


class Moments:
    """Count, mean and scatter matrix of the C-dimensional vectors seen so far, in float64."""

    def __init__(self, channels: int, device: str = "cpu") -> None:
        """Start with no vectors."""
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def update(self, maps: torch.Tensor) -> None:
        """Add every position of maps (B, C, h, w) as one vector."""
        rows = maps.permute(0, 2, 3, 1).flatten(0, 2).double()  # (B*h*w, C)
        mean = rows.mean(0)
        centred = rows - mean
        self.add(len(rows), mean, centred.T @ centred)

    def add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Add the vectors of other moments, given their count, mean (C,) and scatter about it (C, C), float64."""
        shift = mean - self.mean
        total = self.count + count
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total


def fit_basis(moments: Moments, dims: int) -> LayerBasis:
    """Compute the PCA of the vectors in `moments`, with min(dims, channels) components.

    Returns:
        Components by descending variance; the sign of each makes its largest entry positive, so that two fits of the
        same data agree.

    Raises:
        PipelineError: There are fewer than two vectors.
    """
    if moments.count < 2:
        raise PipelineError(
            "A PCA basis cannot be fitted on one position of one map. Set a larger extract_features.image_size, or "
            "use more training images."
        )
    variance, vectors = torch.linalg.eigh(moments.scatter.cpu() / (moments.count - 1))  # ascending
    variance, components = np.maximum(variance.numpy()[::-1], 0), vectors.numpy()[:, ::-1].T
    largest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(len(components)), largest])[:, None]
    return LayerBasis(
        mean=moments.mean.cpu().numpy(),
        components=np.ascontiguousarray(components[:dims]),
        explained_variance=variance[:dims].copy(),
        total_variance=float(variance.sum()),
    )


class Projector:
    """Applies the layers' bases on the device: maps of all layers -> one fused representation."""

    def __init__(self, layers: dict[str, LayerBasis], device: str) -> None:
        """Hold the bases as float32 on `device`; the fused vector keeps the order of `layers`."""
        self._layers = {
            name: (_float32(basis.mean, device), _float32(basis.components, device)) for name, basis in layers.items()
        }

    def __call__(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute the energies of the principal components.

        Args:
            features: Layer -> float32 (B, C_l, h_l, w_l).

        Returns:
            float32 (B, D), D the sum of the layers' dims, all >= 0: per component the L2 norm over space, as the
            authors pool (sign and place are lost, so the sign of a component does not matter).
        """
        parts = []
        for name, (mean, components) in self._layers.items():
            centred = features[name].flatten(2) - mean[:, None]  # (B, C_l, h*w)
            parts.append((components @ centred).norm(dim=2))  # (B, d_l)
        return torch.cat(parts, dim=1)


def column_ranges(channels: dict[str, int], dims: list[int]) -> dict[str, list[int]]:
    """Layer -> [first column, one past its last] in the fused vector; a layer has min(dims, channels) columns.

    Raise ConfigError unless there is one number in `dims`, which is extract_features.dims, per layer.
    """
    if len(dims) != len(channels):
        raise ConfigError(
            f"extract_features.dims = {dims} does not fit layers = {list(channels)}. Set one number per layer."
        )
    ranges, start = {}, 0
    for (layer, count), wanted in zip(channels.items(), dims, strict=True):
        stop = start + min(wanted, count)
        ranges[layer] = [start, stop]
        start = stop
    return ranges


def _float32(array: np.ndarray, device: str) -> torch.Tensor:
    return torch.from_numpy(array).to(device, torch.float32)
