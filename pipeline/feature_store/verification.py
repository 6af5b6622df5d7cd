"""Is a feature set whole? Every fault it has, a line each, not the first alone.

Quickly: the manifest, sizes, layouts, row counts, index coverage, the range of labels and prompts, the basis. Fully:
every byte as well, by SHA-256 per file and CRC-32 per row, and that every feature is finite. Each byte is then read
once; hashing and the rows' checks run side by side on the same memory.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.errors import PipelineError
from pipeline.feature_store.reader import FeatureSet, read_basis, read_manifest
from pipeline.feature_store.schema import EXTRACT_AGAIN, Features

_FLOAT16_EXPONENT = 0x7C00  # all ones in infinities and NaNs


def faults(path: Path, full: bool, advance: Callable[[int], object] = lambda size: None) -> list[str]:
    """What is wrong with the set in folder `path`: one line a fault, with what to do; none if it is whole.

    Args:
        path: the set's folder.
        full: read every byte.
        advance: is told the bytes of every file that is done.
    """
    try:
        manifest = read_manifest(path)
    except PipelineError as error:
        return [str(error)]
    found = _strangers(path, {entry.file for entry in manifest.files})
    try:
        read_basis(path, manifest.basis, manifest.fingerprint, list(manifest.content.layers))
    except PipelineError as error:
        found.append(str(error))
    missing = sorted(set(range(manifest.num_shards)) - set(manifest.shards))
    if missing:
        found.append(f"{path} is incomplete (no shard {', '.join(map(str, missing))}): run `pipeline extract-features`")
    check = _Check(FeatureSet(path, unchecked=True), full)
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        hashes = {shard: pool.submit(check.hash, shard) for shard in manifest.shards} if full else {}
        rows = {shard: pool.submit(check.rows, shard) for shard in manifest.shards}
        for shard, entry in sorted(manifest.shards.items()):
            lines = ([hashes[shard].result()] if full else []) + rows[shard].result()
            found += dict.fromkeys(line for line in lines if line)
            advance(entry.bytes)
    return found


def _strangers(path: Path, expected: set[str]) -> list[str]:
    """Files of the set's kind that its manifest does not name."""
    present = {file.name for file in path.glob("*.h5")}
    return [
        f"{path / name} is not in the manifest, so nothing reads it: delete it" for name in sorted(present - expected)
    ]


class _Check:
    """The checks of one shard."""

    def __init__(self, features: FeatureSet, full: bool) -> None:
        self._features, self._full = features, full
        self._manifest = features.manifest

    def hash(self, shard: int) -> str | None:
        """The file against its SHA-256."""
        problem = self._manifest.shards[shard].difference(self._features.path)
        return problem and f"{problem}: {EXTRACT_AGAIN}"

    def rows(self, shard: int) -> list[str]:
        """The layout, then what the rows hold."""
        return list(self._rows(shard))

    def _rows(self, shard: int) -> Iterator[str]:
        entry, wanted = self._manifest.shards[shard], np.array(self._manifest.shard_rows(shard))
        file = self._features.path / entry.file
        try:
            maps = self._features.open_shard(shard)
        except PipelineError as error:
            yield str(error)
            return
        if entry.file != f"shard-{shard:05d}.h5" or entry.rows != len(wanted):
            yield f"{self._features.path}: its manifest's entry of shard {shard} is wrong: {EXTRACT_AGAIN}"
        content = self._manifest.content
        if not np.array_equal(maps["index"], wanted):
            yield f"{file} does not hold samples {wanted[0]} to {wanted[-1]} in order: {EXTRACT_AGAIN}"
        for name, count in (("label", len(content.class_names)), ("prompt_class", len(content.prompts))):
            if maps[name].min() < 0 or maps[name].max() >= count:
                yield f"{file}: {name} goes beyond 0 to {count - 1}: {EXTRACT_AGAIN}"
        if self._full:
            yield from self._values(file, maps)

    def _values(self, file: Path, maps: dict[str, np.ndarray]) -> Iterator[str]:
        corrupt, infinite = [], []
        for start, rows in _blocks(maps):
            corrupt += (np.flatnonzero(rows.crc32() != maps["crc32"][start : start + len(rows.index)]) + start).tolist()
            if not (_finite(rows.denoised) and _finite(rows.prompted)):
                infinite.append(start)
        if corrupt:
            yield f"{file}: {len(corrupt)} rows are corrupt, the first {corrupt[0]} (checksum differs): {EXTRACT_AGAIN}"
        if infinite:
            yield f"{file}: features are not finite near row {infinite[0]}: {EXTRACT_AGAIN}"


def _blocks(maps: dict[str, np.ndarray], rows: int = 64) -> Iterator[tuple[int, Features]]:
    """Parts of a shard small enough for the processor's cache, and where each starts."""
    fields = {name: values for name, values in maps.items() if name != "crc32"}
    for start in range(0, len(maps["index"]), rows):
        yield start, Features(**{name: np.array(values[start : start + rows]) for name, values in fields.items()})


def _finite(values: np.ndarray) -> bool:
    """Whether all float16 are finite: by their exponents, which is many times faster than np.isfinite."""
    bits = values.reshape(-1).view(np.uint16)
    return not len(bits) or int((bits & 0x7FFF).max()) < _FLOAT16_EXPONENT


def total_bytes(path: Path) -> int:
    """Bytes of the set's shards, by its manifest; 0 if that cannot be read."""
    try:
        return sum(entry.bytes for entry in read_manifest(path).shards.values())
    except PipelineError:
        return 0
