"""Is a feature set whole? Every fault it has, a line each, not the first alone.

Quickly: the manifest, sizes, layouts, row counts, index coverage, the range of labels and prompts, each row's positive
prompt, the basis. Fully: every byte as well, by SHA-256 per file and CRC-32 per row, and that every feature is finite.
A shard's hash and its rows are then taken side by side, one shard after the other, so that a set larger than the memory
is read from the disk once.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.errors import PipelineError
from pipeline.feature_store.reader import FeatureSet, read_manifest
from pipeline.feature_store.schema import Fault, Features, positive_matches
from pipeline.io.hdf5 import check_not_written
from pipeline.io.system_errors import SystemRefusal, entries

_FLOAT16_EXPONENT = 0x7C00  # all ones in infinities and NaNs
_BLOCK = 1 << 18  # bytes hashed at a time
_MOST_THREADS = 16  # each has a file open, or two
_ROWS = 64  # checked at a time: small enough for the processor's cache


def faults(path: Path, full: bool, advance: Callable[[int], object] = lambda size: None) -> list[PipelineError]:
    """What is wrong with the set in folder `path`: a line a fault, with what to do; none if it is whole.

    Args:
        path: the set's folder.
        full: read every byte.
        advance: is told the bytes of every shard that is done.
    """
    try:
        features = FeatureSet(path, unchecked=True)
    except PipelineError as error:
        return [error]
    manifest = features.manifest
    found: list[PipelineError] = []
    try:
        found += _strangers(path, {entry.file for entry in manifest.files})
        features.basis()
    except PipelineError as error:
        found.append(error)
    have, want = len(manifest.shards), manifest.num_shards
    if have != want:
        found.append(Fault(f"{path} is incomplete ({have} of {want} shards)", "run `pipeline extract-features`"))
    with _Checks(features, full) as checks:
        for shard, wrong in checks.all():
            found += wrong
            advance(manifest.shards[shard].bytes)
    return _by_reason(found)


def _by_reason(found: list[PipelineError]) -> list[PipelineError]:
    """Refusals of the system in one line a reason: it may be the same for thousands of files."""
    refused: dict[tuple[str, str], list[Path]] = {}
    for error in found:
        if isinstance(error, SystemRefusal):
            refused.setdefault((error.reason, error.remedy), []).append(error.path)
    faults = [error for error in found if not isinstance(error, SystemRefusal)]
    return faults + [SystemRefusal(paths[0], *why, len(set(paths)) - 1) for why, paths in refused.items()]


def total_bytes(path: Path) -> int:
    """Bytes of the set's shards, by its manifest, for a progress bar; 0 if that cannot be read."""
    try:
        return sum(entry.bytes for entry in read_manifest(path).shards.values())
    except PipelineError:
        return 0


def _strangers(path: Path, expected: set[str]) -> list[PipelineError]:
    """Files of the set's kind that its manifest does not name."""
    present = {file.name for file in entries(path) if file.suffix == ".h5"}
    return [
        Fault(f"{path / name} is not in the manifest, so nothing reads it", "delete it")
        for name in sorted(present - expected)
    ]


class _Checks:
    """The checks of all shards, by threads that end at once when the caller is interrupted."""

    def __init__(self, features: FeatureSet, full: bool) -> None:
        self._features, self._full = features, full
        self._manifest = features.manifest
        self._stopped = threading.Event()

    def __enter__(self) -> "_Checks":
        self._pool = ThreadPoolExecutor(min(_MOST_THREADS, max(2, os.cpu_count() or 1)))
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def all(self) -> Iterator[tuple[int, list[PipelineError]]]:
        """Every shard in order, and what is wrong with it; those after it are being read meanwhile."""
        begun = {shard: self._begin(shard) for shard in sorted(self._manifest.shards)}
        for shard, parts in begun.items():
            wrong = [fault for part in parts for fault in part.result()]
            yield shard, list({str(fault): fault for fault in wrong}.values())

    def _begin(self, shard: int) -> "list[Future[list[PipelineError]]]":
        checks = [self._file, self._rows] if self._full else [self._rows]
        return [self._pool.submit(check, shard) for check in checks]

    def _file(self, shard: int) -> list[PipelineError]:
        """The file against its SHA-256."""
        try:
            wrong = self._manifest.shards[shard].fault(self._features.path, self._sha256)
        except SystemRefusal as refused:
            return [refused]
        return [wrong] if wrong else []

    def _sha256(self, stream: BinaryIO) -> str:
        digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
        while size := stream.readinto(block):  # type: ignore[attr-defined]
            self._go_on()
            digest.update(block[:size])
        return digest.hexdigest()

    def _rows(self, shard: int) -> list[PipelineError]:
        """The layout, then what the rows hold."""
        file = self._features.path / self._manifest.shards[shard].file
        try:
            maps = self._features.open_shard(shard)
            found: list[PipelineError] = [Fault(f"{file} {what}") for what in self._wrong_numbers(shard, maps)]
            if self._full:
                found += [Fault(f"{file}: {what}") for what in self._wrong_values(maps)]
            if found:
                check_not_written(file)
        except PipelineError as error:
            return [error]
        return found

    def _wrong_numbers(self, shard: int, maps: dict[str, np.ndarray]) -> Iterator[str]:
        """Of samples, labels and prompts."""
        wanted, content = self._manifest.shard_rows(shard), self._manifest.content
        if not np.array_equal(maps["index"], np.arange(wanted.start, wanted.stop)):
            yield f"does not hold samples {wanted[0]} to {wanted[-1]} in order"
        for name, count in (("label", len(content.class_names)), ("prompt_class", len(content.prompts))):
            if maps[name].min() < 0 or maps[name].max() >= count:
                yield f"has a {name} beyond 0 to {count - 1}"
        positives = positive_matches(content.positive, maps["prompt_class"], maps["label"]).sum(1)
        if len(wrong := np.flatnonzero(positives != 1)):
            yield f"has {len(wrong)} rows without their positive prompt once, the first {wrong[0]}"

    def _wrong_values(self, maps: dict[str, np.ndarray]) -> Iterator[str]:
        """By the rows' checksums, and features that are not finite."""
        corrupt, infinite = [], []
        for start, rows in _blocks(maps):
            self._go_on()
            corrupt += (np.flatnonzero(rows.crc32() != maps["crc32"][start : start + len(rows.index)]) + start).tolist()
            if not (_finite(rows.denoised) and _finite(rows.prompted)):
                infinite.append(start)
        if corrupt:
            yield f"{len(corrupt)} rows are corrupt, the first {corrupt[0]} (checksum differs)"
        if infinite:
            yield f"features are not finite near row {infinite[0]}"

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise CancelledError


def _blocks(maps: dict[str, np.ndarray]) -> Iterator[tuple[int, Features]]:
    """Parts of a shard, and where each starts."""
    fields = {name: values for name, values in maps.items() if name != "crc32"}
    for start in range(0, len(maps["index"]), _ROWS):
        yield start, Features(**{name: np.array(values[start : start + _ROWS]) for name, values in fields.items()})


def _finite(values: np.ndarray) -> bool:
    """Whether all float16 are finite: by their exponents, which is many times faster than np.isfinite."""
    bits = values.reshape(-1).view(np.uint16)
    return not len(bits) or int((bits & 0x7FFF).max()) < _FLOAT16_EXPONENT
