"""A feature set as a map-style dataset of PyTorch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.feature_store.schema import Features

if TYPE_CHECKING:
    from pipeline.feature_store.reader import FeatureSet


class FeatureDataset(Dataset[dict[str, Tensor]]):
    """Samples are dictionaries of tensors, which `DataLoader` collates as they are.

    index int64 (), label int64 (), denoised float16 (D,), prompted float16 (P, D), prompt_class int16 (P,); `Features`
    describes them. Loader processes may be forked or spawned.
    """

    def __init__(self, features: "FeatureSet") -> None:
        """Use an open feature set."""
        self.features = features

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample."""
        return _tensors(self.features[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return several samples, read together; `DataLoader` calls this once per batch."""
        rows = self.features.read(np.asarray(indices))
        return [_tensors(rows[place]) for place in range(len(rows))]


def _tensors(row: Features) -> dict[str, Tensor]:
    return {name: torch.as_tensor(values) for name, values in vars(row).items()}
