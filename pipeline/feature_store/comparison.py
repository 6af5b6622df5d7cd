"""What differs between two feature sets: what decides them, what made them, and the numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.feature_store.reader import FeatureSet
from pipeline.feature_store.schema import Manifest
from pipeline.settings.config import dotted


@dataclass(frozen=True)
class Difference:
    """A key of the manifest, dotted, and its value in either set; None where a set has none."""

    key: str
    first: Any
    second: Any


@dataclass(frozen=True)
class NumberDifference:
    """Of one layer of one representation: largest and mean absolute difference, and the share of unequal numbers."""

    representation: str
    layer: str
    largest: float
    mean: float
    share_unequal: float


def settings(first: Manifest, second: Manifest) -> list[Difference]:
    """Keys of `content` (they decide the features), sizes and `provenance` (they do not) that differ."""
    pairs = [dotted(_comparable(manifest)) for manifest in (first, second)]
    keys = sorted(set(pairs[0]) | set(pairs[1]))
    return [
        Difference(key, pairs[0].get(key), pairs[1].get(key)) for key in keys if pairs[0].get(key) != pairs[1].get(key)
    ]


def incomparable(first: Manifest, second: Manifest) -> str | None:
    """Why the numbers of two sets cannot be compared one by one; None if they can."""
    shapes = [(m.rows, m.content.layers, m.prompts_per_image) for m in (first, second)]
    return None if shapes[0] == shapes[1] else "the sets have other numbers of images, layers, dimensions or prompts"


def numbers(first: Path, second: Path) -> list[NumberDifference]:
    """How far the features of two sets lie apart that are not `incomparable`.

    Raises:
        PipelineError: a set is damaged.
    """
    sets = [FeatureSet(first), FeatureSet(second)]
    layers = sets[0].manifest.content.layers
    sums = {(kind, layer): np.zeros(4) for kind in ("denoised", "prompted") for layer in layers}
    for start in range(0, sets[0].manifest.rows, 1024):
        index = np.arange(start, min(sets[0].manifest.rows, start + 1024))
        rows = [features.read(index) for features in sets]
        for (kind, layer), total in sums.items():
            low, high = layers[layer]
            a, b = (getattr(row, kind)[..., low:high].astype(np.float32) for row in rows)
            gap = np.abs(a - b)
            total[:] = max(total[0], gap.max()), total[1] + gap.sum(), total[2] + (gap > 0).sum(), total[3] + gap.size
    return [
        NumberDifference(kind, layer, float(total[0]), float(total[1] / total[3]), float(total[2] / total[3]))
        for (kind, layer), total in sums.items()
    ]


def _comparable(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump(include={"content", "rows", "rows_per_shard", "provenance"})
