"""Verify a feature set and list every problem, not only the first.

Quick: the manifest, file sizes, layouts, row counts, sample indices, the range of labels and prompts, each row's
matching prompt, the basis. Full: also every byte, by SHA-256 per file and CRC-32 per row, and that every feature is
finite. A shard is hashed while its rows are checked, and one shard follows the other, so that a set larger than memory
is read from the disk only once. Rows are checked piece by piece, so that memory does not grow with the set.
"""

import contextlib
import hashlib
import itertools
import math
import os
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.errors import PipelineError
from pipeline.feature_store.reader import FeatureSet, read_manifest
from pipeline.feature_store.schema import FIELDS, Features, InvalidFeatureSet, positive_matches
from pipeline.io.hdf5 import check_not_written
from pipeline.io.system_errors import SystemRefusal, entries

_FLOAT16_EXPONENT = 0x7C00  # all ones in infinities and NaNs
_BLOCK = 1 << 18  # bytes hashed at a time
_MOST_THREADS = 16  # each has one or two files open
_PIECE = 2 << 20  # bytes of rows checked at a time
_NUMBERS = ("index", "label", "prompt_class")

_WrongRows = Iterator[tuple[str, np.ndarray]]
"""A problem, to be formatted with its count and first row; and the rows of the piece that have it, int64 (n,)."""


def problems(path: Path, full: bool, advance: Callable[[int], object] = lambda size: None) -> list[PipelineError]:
    """Return every problem of the set in folder `path`, each with what to do; an empty list if it is intact.

    `full` reads every byte; `advance` is called with the size of every shard that has been checked.
    """
    try:
        features = FeatureSet(path, unchecked=True)
    except PipelineError as error:
        return [error]
    manifest = features.manifest
    found: list[PipelineError] = []
    try:
        found += _unexpected_files(path, {entry.file for entry in manifest.files})
        features.basis()
    except PipelineError as error:
        found.append(error)
    have, want = len(manifest.shards), manifest.plan.num_shards
    if have != want:
        problem = f"{path} is incomplete ({have} of {want} shards)"
        found.append(InvalidFeatureSet(problem, "Run `pipeline extract-features`"))
    with contextlib.closing(_Checks(features, full).run()) as checked:
        for shard, of_shard in checked:
            found += of_shard
            advance(manifest.shards[shard].bytes)
    return _merge_refusals(found)


def _merge_refusals(found: list[PipelineError]) -> list[PipelineError]:
    """Report the operating system's refusals once per reason, which may be the same for thousands of files."""
    refused: dict[tuple[str, str], list[Path]] = {}
    for error in found:
        if isinstance(error, SystemRefusal):
            refused.setdefault((error.reason, error.remedy), []).append(error.path)
    others = [error for error in found if not isinstance(error, SystemRefusal)]
    return others + [SystemRefusal(paths[0], *why, len(set(paths)) - 1) for why, paths in refused.items()]


def total_bytes(path: Path) -> int:
    """Return the size of the set's shards, by its manifest, for a progress bar; 0 if that cannot be read."""
    try:
        return sum(entry.bytes for entry in read_manifest(path).shards.values())
    except PipelineError:
        return 0


def _unexpected_files(path: Path, expected: set[str]) -> list[PipelineError]:
    """Return a problem for each HDF5 file that the manifest does not name."""
    extra = [file for file in entries(path) if file.suffix == ".h5" and file.name not in expected]
    return [InvalidFeatureSet(f"{file} is not in the manifest, so nothing reads it", "Delete it") for file in extra]


class _Checks:
    """The checks of all shards, by threads that stop at once when the caller is interrupted."""

    def __init__(self, features: FeatureSet, full: bool) -> None:
        self._features, self._manifest, self._full = features, features.manifest, full
        self._stopped = threading.Event()

    def run(self) -> Generator[tuple[int, list[PipelineError]], None, None]:
        """Yield every shard in order, with its problems; the next ones are being read meanwhile."""
        checks = [self._file, self._rows] if self._full else [self._rows]
        pool = ThreadPoolExecutor(min(_MOST_THREADS, max(2, os.cpu_count() or 1)))
        try:
            shards = sorted(self._manifest.shards)
            begun = {shard: [pool.submit(check, shard) for check in checks] for shard in shards}
            for shard, parts in begun.items():
                found = [problem for part in parts for problem in part.result()]
                # The layout and the bytes may give the same problem, e.g. a missing file.
                yield shard, list({str(problem): problem for problem in found}.values())
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)

    def _file(self, shard: int) -> list[PipelineError]:
        """Check the file against its SHA-256."""
        try:
            problem = self._manifest.shards[shard].content_problem(self._features.path, self._sha256)
        except SystemRefusal as refused:
            return [refused]
        return [problem] if problem else []

    def _sha256(self, stream: BinaryIO) -> str:
        digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
        while size := stream.readinto(block):  # type: ignore[attr-defined]
            self._stop_if_interrupted()
            digest.update(block[:size])
        return digest.hexdigest()

    def _rows(self, shard: int) -> list[PipelineError]:
        """Check the layout, then the content of the rows."""
        file = self._features.path / self._manifest.shards[shard].file
        found: dict[str, tuple[int, int]] = {}  # problem -> how many rows have it, and the first
        try:
            for start, piece in self._pieces(shard):
                checks = [self._wrong_numbers(shard, start, piece), self._wrong_values(piece) if self._full else ()]
                for problem, wrong in itertools.chain(*checks):
                    if len(wrong):
                        count, first = found.get(problem, (0, start + wrong[0]))
                        found[problem] = count + len(wrong), first
            if found:
                check_not_written(file)
        except PipelineError as error:
            return [error]
        texts = (problem.format(count=count, first=first) for problem, (count, first) in found.items())
        return [InvalidFeatureSet(f"{file}{text}") for text in texts]

    def _pieces(self, shard: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield the first row of each piece and its arrays; only one piece is mapped at a time."""
        content, rows = self._manifest.content, self._manifest.shards[shard].rows
        types, shapes = content.datasets, content.shapes(1)
        names = types if self._full else _NUMBERS
        size = sum(math.prod(shapes[name]) * np.dtype(types[name]).itemsize for name in names)
        step = max(1, _PIECE // size)
        for start in range(0, rows, step):
            self._stop_if_interrupted()
            maps = self._features.shards.open(shard, keep=False)
            yield start, {name: np.array(maps[name][start : start + step]) for name in names}

    def _wrong_numbers(self, shard: int, start: int, piece: dict[str, np.ndarray]) -> _WrongRows:
        """Check the numbers of samples, labels and prompts; `start` is the first row of the piece."""
        samples, content = self._manifest.plan.shard_rows(shard), self._manifest.content
        wanted = np.arange(samples.start + start, samples.start + start + len(piece["index"]))
        yield f" does not hold samples {samples[0]} to {samples[-1]} in order", np.flatnonzero(piece["index"] != wanted)
        for name, count in (("label", len(content.class_names)), ("prompt_class", len(content.prompts))):
            outside = (piece[name] < 0) | (piece[name] >= count)
            yield f" has a {name} outside 0 to {count - 1}", np.flatnonzero(outside)
        positives = positive_matches(content.positive, piece["prompt_class"], piece["label"]).sum(1)
        problem = " has {count} rows without exactly one matching prompt, the first is row {first}"
        yield problem, np.flatnonzero(positives != 1)

    def _wrong_values(self, piece: dict[str, np.ndarray]) -> _WrongRows:
        """Check the rows' checksums, and that all features are finite."""
        rows = Features(**{name: piece[name] for name in FIELDS})
        problem = ": {count} rows are corrupt, the first is row {first} (checksum differs)"
        yield problem, np.flatnonzero(rows.crc32() != piece["crc32"])
        finite = _finite(rows.denoised) and _finite(rows.prompted)
        yield ": features near row {first} are not finite", np.arange(0 if finite else 1)

    def _stop_if_interrupted(self) -> None:
        if self._stopped.is_set():
            raise CancelledError


def _finite(values: np.ndarray) -> bool:
    """Return whether all values, float16 or int8, are finite, by their exponents: much faster than np.isfinite."""
    if values.dtype == np.int8:
        return True
    bits = values.reshape(-1).view(np.uint16)
    return not len(bits) or int((bits & 0x7FFF).max()) < _FLOAT16_EXPONENT
