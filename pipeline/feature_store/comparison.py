"""Compare two feature sets: the settings that made them, and their numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.feature_store.reader import FeatureSet
from pipeline.feature_store.schema import Manifest
from pipeline.settings.config import dotted


@dataclass(frozen=True)
class Difference:
    """A dotted key of the manifest, and its value in either set; None where a set lacks it."""

    key: str
    first: Any
    second: Any


@dataclass(frozen=True)
class NumberDifference:
    """For one layer of one representation: largest and mean absolute difference, and the share of unequal numbers."""

    representation: str
    layer: str
    largest: float
    mean: float
    share_unequal: float


def settings(first: Manifest, second: Manifest) -> list[Difference]:
    """Return the differing keys of `content` (determines the features), sizes and `provenance` (does not).

    The provenance holds the settings that made a set; they are compared if both sets have them.
    """
    compared = {"content", "rows", "rows_per_shard", "provenance"}
    one, other = (
        dotted(manifest.model_dump(include=compared)) | {"content.storage": manifest.content.storage}  # even float16
        for manifest in (first, second)
    )
    both = "settings" in first.provenance and "settings" in second.provenance
    keys = (key for key in sorted(one.keys() | other.keys()) if both or not key.startswith("provenance.settings"))
    return [Difference(key, one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)]


def incomparable(first: Manifest, second: Manifest) -> str | None:
    """Return why the numbers of two sets cannot be compared one by one; None if they can."""
    one, other = ((m.rows, m.content.layers, m.prompts_per_image) for m in (first, second))
    return None if one == other else "the sets differ in their number of images, layers, dimensions or prompts"


def numbers(first: Path, second: Path) -> list[NumberDifference]:
    """Compare the features of two sets that are not `incomparable`; raise FeatureSetError if one is damaged."""
    sets = [FeatureSet(first), FeatureSet(second)]
    totals = {(kind, layer): np.zeros(4) for kind in ("denoised", "prompted") for layer in sets[0].layers}
    for rows in zip(*(features.in_order() for features in sets), strict=True):
        for (kind, layer), total in totals.items():
            columns = sets[0].columns(layer)
            a, b = (getattr(row, kind)[..., columns].astype(np.float32) for row in rows)
            gap = np.abs(a - b)
            total[:] = max(total[0], gap.max()), total[1] + gap.sum(), total[2] + (gap > 0).sum(), total[3] + gap.size
    means = {key: (largest, gaps / count, unequal / count) for key, (largest, gaps, unequal, count) in totals.items()}
    return [NumberDifference(*key, *map(float, values)) for key, values in means.items()]
