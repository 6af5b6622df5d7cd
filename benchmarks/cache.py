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
import synthetic_set

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
    plan = synthetic_set.plan(rows, rows_per_shard, prompts, dims)
    shards = [synthetic_set.features(plan, shard) for shard in range(plan.num_shards)]
    megabytes = sum(array.nbytes for shard in shards for array in vars(shard).values()) / 1e6
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        seconds = {
            "write, plain": _best(repeats, lambda: _write_plain(root / "plain", shards)),
            "write, cache": _best(repeats, lambda: synthetic_set.write(root, plan, shards)),
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


def _write_plain(file: Path, shards: list[Features]) -> None:
    with file.open("wb") as stream:
        for shard in shards:
            for array in vars(shard).values():
                stream.write(array.data)
        os.fsync(stream.fileno())
    file.unlink()


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
