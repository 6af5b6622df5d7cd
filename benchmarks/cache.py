"""Measure writing and reading the feature cache in MB/s, and compare with plain writes and reads of the same bytes.

Rows are read and checked through `FeatureSet`, as in training: in order, and in random batches. Plain reads load the
files into memory. Both are repeated and the fastest counts, so both read from the page cache.
`pipeline features verify --full` is compared with plain SHA-256 hashing of the same files.

    python benchmarks/cache.py --rows 8192 --prompts 10 --dims 512
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from pipeline import feature_store as store
from pipeline import provenance
from pipeline.feature_store import Features, FeatureSet, verification


@click.command()
@click.option("--rows", default=8192, help="Images.")
@click.option("--rows-per-shard", default=4096)
@click.option("--prompts", default=10, help="Prompts per image.")
@click.option("--dims", default=512, help="Numbers per representation.")
@click.option("--batch", default=64, help="Rows of a random batch.")
@click.option("--repeats", default=5, help="Measurements of each; the fastest counts.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write; a temporary folder by default.")
def main(
    rows: int, rows_per_shard: int, prompts: int, dims: int, batch: int, repeats: int, folder: Path | None
) -> None:
    """Measure, print the table, then one JSON line."""
    plan = store.Plan(_content(prompts, dims), rows, rows_per_shard, {})
    shards = [_features(plan.shard_rows(shard), prompts, dims) for shard in range(plan.num_shards)]
    megabytes = sum(array.nbytes for shard in shards for array in vars(shard).values()) / 1e6
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        seconds = {
            "write, plain": _best(repeats, lambda: _write_plain(root / "plain", shards)),
            "write, cache": _best(repeats, lambda: _write_cache(root, plan, shards)),
        }
        cache = FeatureSet(root / "set")
        seconds |= {
            "read in order, plain": _best(repeats, lambda: [f.read_bytes() for f in sorted(root.glob("set/*.h5"))]),
            "read in order, cache": _best(repeats, lambda: _read_in_order(cache, rows, rows_per_shard)),
        }
        if wrong := verification.problems(root / "set", full=True):
            raise click.ClickException(wrong[0])
        files = sorted(root.glob("set/*.h5"))
        seconds |= {
            "SHA-256": _best(repeats, lambda: [provenance.file_sha256(file) for file in files]),
            "verify --full": _best(repeats, lambda: verification.problems(root / "set", full=True)),
        }
        order = np.random.default_rng(0).permutation(rows)
        batches = [order[start : start + batch] for start in range(0, rows - batch + 1, batch)]
        seconds[f"read batches of {batch} at random, cache"] = _best(
            repeats, lambda: [cache.read(index) for index in batches]
        )
    rates = {what: megabytes / value for what, value in seconds.items()}
    width = max(map(len, rates))
    for what, rate in rates.items():
        click.echo(f"{what:<{width}}  {rate:9.0f} MB/s")
    shares = {
        "write": rates["write, cache"] / rates["write, plain"],
        "read in order": rates["read in order, cache"] / rates["read in order, plain"],
        "verify": rates["verify --full"] / rates["SHA-256"],
    }
    per_batch = 1000 * seconds[f"read batches of {batch} at random, cache"] / len(batches)
    click.echo(f"cache / plain: write {shares['write']:.0%}, read in order {shares['read in order']:.0%}")
    click.echo(f"verify --full / SHA-256 of the same bytes: {shares['verify']:.0%}")
    click.echo(f"a random batch of {batch}: {per_batch:.2f} ms")
    result = {"megabytes": megabytes, "megabytes_per_second": rates, "share_of_plain": shares}
    click.echo(json.dumps(result | {"ms_per_random_batch": per_batch, "provenance": provenance.describe()}))


def _content(prompts: int, dims: int) -> store.Content:
    return store.Content(
        extraction_version=1, dataset_hash="", class_names=["one"], backbone={}, timestep=0, image_size=32,
        layers={"layer": [0, dims]}, prompts=[[str(n)] for n in range(prompts)], positive="label", denoise_prompt="",
        negatives="all", noise_seed=0, basis_images=2, basis_sha256=None, image_conditioning=None, dtype="float32",
    )  # fmt: skip


def _features(rows: range, prompts: int, dims: int) -> Features:
    rng = np.random.default_rng(rows.start)
    n = len(rows)
    return Features(
        np.array(rows), np.zeros(n, np.int64), rng.random((n, dims), np.float32).astype(np.float16),
        rng.random((n, prompts, dims), np.float32).astype(np.float16),
        np.tile(np.arange(prompts, dtype=np.int16), (n, 1)),
    )  # fmt: skip


def _write_plain(file: Path, shards: list[Features]) -> None:
    with file.open("wb") as stream:
        for shard in shards:
            for array in vars(shard).values():
                stream.write(array.data)
        os.fsync(stream.fileno())
    file.unlink()


def _write_cache(root: Path, plan: store.Plan, shards: list[Features]) -> None:
    staging = root / "staging"
    for file in staging.glob("*.*"):
        file.unlink()
    writer = store.FeatureSetWriter(staging, plan, "")
    dims = plan.content.num_dims
    layer = store.LayerBasis(np.zeros(dims), np.eye(dims), np.ones(dims), float(dims))
    writer.write_basis(store.Basis({"layer": layer}, np.zeros(dims), np.ones(dims)))
    for number, shard in enumerate(shards):
        writer.write_shard(number, shard, 0)
    writer.publish(root / "set")


def _read_in_order(cache: FeatureSet, rows: int, step: int) -> None:
    for start in range(0, rows, step):
        cache.read(np.arange(start, min(start + step, rows)))


def _best(repeats: int, action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
