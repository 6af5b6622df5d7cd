"""A copy of a feature set with noise, to share with others who should recognise as few images as possible.

Every number gets Gaussian noise of `scale` times the standard deviation of its dimension, that of the denoising
representations of the basis images, also under the other prompts. The copy stores float16, also of a set of int8, whose
range would clip the noise. docs/security.md has what this costs and what it protects. It does not give differential
privacy, and the mean of many copies has less noise than one.
"""

import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline import seeding
from pipeline.errors import ConfigError, FeatureSetError
from pipeline.feature_store.reader import FeatureSet
from pipeline.feature_store.schema import LEAST_NOISE, MOST_NOISE, Features, Noise
from pipeline.feature_store.writer import FeatureSetWriter

_LARGEST = float(np.finfo(np.float16).max)


def write_copy(features: FeatureSet, scale: float, folder: Path, advance: Callable[[int], object]) -> Path:
    """Write a copy of a complete set with noise, shard by shard, and check every byte of the set on the way.

    Args:
        features: The set, without noise.
        scale: Standard deviation of the noise in multiples of each dimension's own, `LEAST_NOISE` to `MOST_NOISE`.
        folder: An empty folder for the copy and for what is left of writing it.
        advance: Called with the size of every shard that was copied.

    Returns:
        The copy's folder, in `folder`.

    Raises:
        ConfigError: The scale is invalid.
        FeatureSetError: The set is damaged, or has noise already.
        PipelineError: A file cannot be written.
    """
    if not LEAST_NOISE <= scale <= MOST_NOISE:  # not true of NaN either
        problem = f"{scale:g} is not a valid scale of noise"
        raise ConfigError(f"{problem}. Choose from {LEAST_NOISE:g} to {MOST_NOISE:g} standard deviations.")
    manifest = features.manifest
    if manifest.content.added_noise:
        remedy = "Export it as it is, or add noise to the set that it was made from"
        raise FeatureSetError(f"{features.path} has {manifest.content.added_noise} already. {remedy}.")
    noise = Noise(scale=scale, draw=secrets.token_hex(16))
    plan = replace(
        manifest.plan, content=manifest.content.model_copy(update={"added_noise": noise, "storage": "float16"})
    )
    hardware = sorted({entry.hardware for entry in manifest.files})
    writer = FeatureSetWriter(folder / "unfinished", plan, ", ".join(hardware))
    basis = features.basis()
    writer.write_basis(basis, manifest.basis.redone_in_float32)
    for shard, entry in sorted(manifest.shards.items()):
        if damage := entry.content_problem(features.path):
            raise damage
        rows = features.read(np.array(plan.shard_rows(shard)))
        _add(rows, scale * basis.std)
        writer.write_shard(shard, rows, entry.redone_in_float32)
        advance(entry.bytes)
    writer.publish(folder / "set")
    return folder / "set"


def _add(rows: Features, deviation: np.ndarray) -> None:
    """Add noise of the standard deviation (D,) to the rows, in place."""
    for row in range(len(rows)):
        generator = seeding.secret_numpy_generator()  # of its own: who knows one image learns nothing of the others
        for values in (rows.denoised[row], rows.prompted[row]):  # (D,), (P, D)
            noisy = values + deviation * generator.standard_normal(values.shape)
            values[...] = np.clip(noisy, -_LARGEST, _LARGEST)
