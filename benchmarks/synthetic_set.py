"""Feature sets of random numbers, for the benchmarks of the cache."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipeline import feature_store as store
from pipeline.feature_store import Features


def plan(rows: int, rows_per_shard: int, prompts: int, dims: int) -> store.Plan:
    """Return the plan of a set with one class and one layer."""
    content = store.Content(
        extraction_version=1, dataset_hash="", class_names=["one"], backbone={}, timestep=0, image_size=32,
        layers={"layer": [0, dims]}, prompts=[[str(n)] for n in range(prompts)], positive="label", denoise_prompt="",
        negatives="all", noise_seed=0, basis_images=2, basis_sha256=None, image_conditioning=None, dtype="float32",
    )  # fmt: skip
    return store.Plan(content, rows, rows_per_shard, {})


def features(plan: store.Plan, shard: int) -> Features:
    """Return the rows of a shard."""
    rows, prompts, dims = plan.shard_rows(shard), plan.content.prompts_per_image, plan.content.num_dims
    rng, n = np.random.default_rng(shard), len(rows)
    return Features(
        np.array(rows), np.zeros(n, np.int64), rng.random((n, dims), np.float32).astype(np.float16),
        rng.random((n, prompts, dims), np.float32).astype(np.float16),
        np.tile(np.arange(prompts, dtype=np.int16), (n, 1)),
    )  # fmt: skip


def write(folder: Path, plan: store.Plan, shards: Iterable[Features]) -> None:
    """Write a set with these shards to `folder`/set, by way of `folder`/staging."""
    staging = folder / "staging"
    for file in staging.glob("*.*"):
        file.unlink()
    writer = store.FeatureSetWriter(staging, plan, "")
    dims = plan.content.num_dims
    layer = store.LayerBasis(np.zeros(dims), np.eye(dims), np.ones(dims), float(dims))
    writer.write_basis(store.Basis({"layer": layer}, np.zeros(dims), np.ones(dims)))
    for number, shard in enumerate(shards):
        writer.write_shard(number, shard, 0)
    writer.publish(folder / "set")
