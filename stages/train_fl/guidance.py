"""Guidance targets: cached representations of a frozen diffusion model, read, selected and scaled for training.

Both representations are energies: non-negative and nearly parallel between images. A target is therefore used as it is
("raw"), with the mean subtracted ("centred"), or also divided by the standard deviation per dimension ("standardised").
Mean and deviation are those of the denoising representations on the basis images.

Targets are frozen, so `prepare` selects, scales and normalises them once, as float32: twice the cache's size. If they
do not fit into memory, they stay `GuidanceOnDisk`, which reads them from the feature set's shards batch by batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline import devices
from pipeline.errors import ConfigError
from pipeline.feature_store import FeatureSet
from pipeline.settings.params import Guidance
from stages.train_fl import losses

_ROWS = 1024  # prepared at a time, which keeps temporary copies small
_READ = 4096  # read at a time: enough to read with several threads


@dataclass(frozen=True)
class GuidanceTargets:
    """Representations of n images: as cached, or as targets after `prepare`."""

    denoised: Tensor  # float16 (n, D) or float32 (n, d)
    prompted: Tensor  # float16 (n, P, D) or float32 (n, P, d)
    positive: Tensor  # int64 (n,), which of the P prompts matches the image

    def select(self, index: Tensor) -> "GuidanceTargets":
        """Return the rows at `index`."""
        return GuidanceTargets(self.denoised[index], self.prompted[index], self.positive[index])

    def to(self, device: str | torch.device) -> "GuidanceTargets":
        """Copy the rows to a device."""
        return GuidanceTargets(*(devices.send(value, torch.device(device)) for value in vars(self).values()))


class TargetSource(Protocol):
    """Where targets come from: `GuidanceSource`, or `planned.PlannedSource` for estimates."""

    @property
    def num_dims(self) -> int:
        """The length d of a target."""

    def bytes_per_sample(self) -> int:
        """Return the size of a sample's targets in memory."""

    def read(self, index: np.ndarray, device: str | torch.device = "cpu") -> GuidanceTargets:
        """Return the targets of the samples `index`, int64 (n,), positions in the training split."""


class GuidanceSource:
    """Reader of a feature set's representations as targets of training."""

    def __init__(self, features: FeatureSet, settings: Guidance) -> None:
        """Read from `features` the layers that `settings` selects, at its scale."""
        basis = features.basis()
        self._features, self._settings = features, settings
        self._layers = features.manifest.content.layers
        self._mean, self._std = torch.from_numpy(basis.mean), torch.from_numpy(basis.std)
        self.num_dims = len(columns(settings, self._layers))

    def bytes_per_sample(self) -> int:
        """Return the size of a sample's targets in memory."""
        return bytes_per_sample(self._settings, self._features.manifest.prompts_per_image, self.num_dims)

    def read(self, index: np.ndarray, device: str | torch.device = "cpu") -> GuidanceTargets:
        """Read the targets of the samples `index`, int64 (n,), positions in the training split, block by block."""
        first = self._read(index[:_READ])
        if len(index) <= _READ:
            return first.to(device)
        whole = [value.new_empty((len(index), *value.shape[1:]), device=device) for value in vars(first).values()]
        for start in range(0, len(index), _READ):
            block = self._read(index[start : start + _READ]) if start else first
            for values, own in zip(whole, vars(block).values(), strict=True):
                values[start : start + _READ] = own
        return GuidanceTargets(*whole)

    def _read(self, index: np.ndarray) -> GuidanceTargets:
        rows = self._features.read(index)
        positive = torch.from_numpy(self._features.positive_prompts(rows))
        cached = GuidanceTargets(torch.from_numpy(rows.denoised), torch.from_numpy(rows.prompted), positive)
        return prepare(cached, self._settings, self._layers, self._mean, self._std)


class GuidanceOnDisk:
    """Targets of n images, read from the shards batch by batch; every row is checked as it is read."""

    def __init__(self, source: TargetSource, index: np.ndarray) -> None:
        """Represent the samples `index`, int64 (n,), positions in the training split."""
        self._source, self._index = source, index

    @property
    def nbytes(self) -> int:
        """The size of all n targets in memory."""
        return len(self._index) * self._source.bytes_per_sample()

    def select(self, index: Tensor) -> GuidanceTargets:
        """Return the rows at `index`, on the CPU."""
        return self._source.read(self._index[index.cpu().numpy()])

    def to(self, device: str | torch.device) -> GuidanceTargets:
        """Read all rows into a device's memory."""
        return self._source.read(self._index, device)


GuidanceRows = GuidanceTargets | GuidanceOnDisk


def bytes_per_sample(settings: Guidance, num_prompts: int, num_dims: int) -> int:
    """Return the size of a sample's targets in memory: float32 of the terms that are used, and an int64."""
    used = (settings.tdcl_weight > 0) * num_prompts + (settings.ndcr_weight > 0)
    return used * num_dims * 4 + 8


def columns(settings: Guidance, layers: Mapping[str, Sequence[int]]) -> list[int]:
    """List the columns of the layers that `settings.layers` selects; their number is the targets' length.

    Args:
        settings: Its `layers` is "all" or names.
        layers: The feature set's layers: name -> [first column, one past the last].

    Raises:
        ConfigError: No layer is named, or one that the set lacks.
    """
    names = list(layers) if settings.layers == "all" else settings.layers
    unknown = [name for name in names if name not in layers]
    if unknown or not names:
        named = ", ".join(unknown) or "no layer"
        raise ConfigError(
            f"guidance.layers names {named}, but the feature set has {', '.join(layers)}. Use these, or all."
        )
    return [column for name in dict.fromkeys(names) for column in range(*layers[name])]


def prepare(
    cached: GuidanceTargets, settings: Guidance, layers: Mapping[str, Sequence[int]], mean: Tensor, std: Tensor
) -> GuidanceTargets:
    """Turn cached rows into training targets: select layers, scale, and normalise (except for NDCR's form "l2").

    Args:
        cached: denoised float16 (n, D), prompted float16 (n, P, D).
        settings: Layers, scales and form; a representation that no term uses becomes empty, (n, 0).
        layers: The feature set's layers: name -> [first column, one past the last].
        mean: The feature set's mean, float (D,).
        std: Its standard deviation, float (D,); a constant dimension (at most 1e-6) is left unscaled.

    Returns:
        denoised float32 (n, d) and prompted float32 (n, P, d) for the d selected columns.
    """
    keep = torch.tensor(columns(settings, layers), device=cached.denoised.device)
    mean, std = mean.float()[keep], std.float()[keep]
    std = torch.where(std > 1e-6, std, torch.ones_like(std))

    def scaled(values: Tensor, scale: str, unit_length: bool) -> Tensor:
        out = torch.empty((*values.shape[:-1], len(keep)), device=values.device)
        for start in range(0, len(values), _ROWS):
            rows = values[start : start + _ROWS].index_select(-1, keep).float()
            if scale != "raw":
                rows = rows - mean
            if scale == "standardised":
                rows = rows / std
            out[start : start + _ROWS] = losses.unit(rows) if unit_length else rows
        return out

    nothing = torch.empty(len(cached.positive), 0, device=cached.denoised.device)
    prompted = scaled(cached.prompted, settings.tdcl_targets, True) if settings.tdcl_weight > 0 else nothing
    unit_length = settings.ndcr_form != "l2"
    denoised = scaled(cached.denoised, settings.ndcr_targets, unit_length) if settings.ndcr_weight > 0 else nothing
    return GuidanceTargets(denoised, prompted, cached.positive)
