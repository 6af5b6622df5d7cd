"""The shards of a set as memory-mapped arrays.

A map takes no file descriptor (`pipeline.io.mapped`), so the maps of all shards are kept for the random batches of
training, and a batch takes the same time whatever the number of shards. A reader that passes over the whole set keeps
none: their pages would count as the process's memory, in the end as much as the set has.

The layout of every shard is cached: mapping a file takes microseconds, reading its layout by HDF5 a millisecond.
"""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from pipeline.feature_store.schema import InvalidFeatureSet, Manifest
from pipeline.io import mapped
from pipeline.io.hdf5 import check_not_written, open_to_read, plain_dataset
from pipeline.io.system_errors import in_words, reading
from pipeline.text import printable

MALFORMED = (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError)
"""The exceptions that h5py raises for a malformed file."""

MOST_CHARACTERS = 200
"""Characters of a file's own text that are quoted in an error."""

_MOST_KEPT = 1 << 14  # maps; Linux allows a process four times as many by default (vm.max_map_count)

_Identity = tuple[int, ...]

_Layout = dict[str, tuple[tuple[int, ...], np.dtype, int]]
"""Shape, type and offset of each dataset in a file."""


class Shards:
    """The shards of one set, for several threads, and after a fork or pickling: no HDF5 handle stays open."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use the shards in folder `path`; nothing is opened yet."""
        self._path, self._manifest = path, manifest
        self._layouts: dict[int, tuple[_Identity, _Layout]] = {}
        self._maps: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple[type, tuple[Path, Manifest]]:
        """Pickle without maps and lock, so that a spawned data loader opens its own."""
        return Shards, (self._path, self._manifest)

    def open(self, shard: int, keep: bool = True) -> dict[str, np.ndarray]:
        """Return the shard's datasets as read-only memory maps, by name; InvalidFeatureSet if it is not intact.

        `keep` them for the next call, which then does not look at the file again; otherwise they are unmapped when the
        last array that refers to them is garbage-collected.
        """
        if self._pid != os.getpid():  # a fork while another thread held the lock left it locked for ever
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:
            if shard in self._maps:
                self._maps.move_to_end(shard)
                return self._maps[shard]
        self.check(shard)  # before mapping, which an empty file does not allow
        file = self._checked_file(shard)
        content, identity = _map(file)
        layout = self._layout(shard, file, identity)
        # Views of the map, because fancy indexing through h5py is a hundred times slower.
        maps = {name: np.ndarray(shape, dtype, content, at) for name, (shape, dtype, at) in layout.items()}
        if keep:
            with self._lock:
                self._maps[shard] = maps
                if len(self._maps) > _MOST_KEPT:
                    self._maps.popitem(last=False)
        return maps

    def check(self, shard: int) -> None:
        """Read the shard's layout, once; raises what `open` raises."""
        if shard not in self._layouts:
            file = self._checked_file(shard)
            with reading(file):
                identity = _identity(file.stat())
            self._layout(shard, file, identity)

    def _layout(self, shard: int, file: Path, identity: _Identity) -> _Layout:
        """Return the layout of the file with this identity; a file that replaced it may belong to another set."""
        if shard not in self._layouts or self._layouts[shard][0] != identity:
            self._layouts[shard] = (identity, self._read_layout(shard, file))
        return self._layouts[shard][1]

    def _checked_file(self, shard: int) -> Path:
        entry = self._manifest.shards[shard]
        if problem := entry.size_problem(self._path):  # reading a map beyond the end of its file kills the process
            raise problem
        return self._path / entry.file

    def _read_layout(self, shard: int, file: Path) -> _Layout:
        shapes, layout = self._manifest.content.shapes(self._manifest.shards[shard].rows), {}
        with opened(file, self._manifest.fingerprint, "does not have the layout of a shard") as h5:
            for name, dtype in self._manifest.content.datasets.items():
                found = plain_dataset(h5, name, file)
                if found.shape != shapes[name] or found.dtype != np.dtype(dtype):
                    raise ValueError(f"{name} is {found.dtype} {found.shape}, not {dtype} {shapes[name]}")
                layout[name] = (found.shape, found.dtype, found.id.get_offset())
        return layout


@contextlib.contextmanager
def opened(file: Path, fingerprint: str, problem: str) -> Iterator[h5py.File]:
    """Yield an open HDF5 file of the set with this fingerprint.

    Raise InvalidFeatureSet if it is missing, truncated or of another set, or if the block fails with `problem`.
    """
    found_problem = "is not a complete HDF5 file"
    try:
        with open_to_read(file) as h5:
            found = h5.attrs.get("fingerprint")
            if not isinstance(found, str) or found != fingerprint:
                raise InvalidFeatureSet(f"{file} belongs to another feature set (fingerprint differs)")
            found_problem = problem
            yield h5
    except MALFORMED as error:
        check_not_written(file)
        raise InvalidFeatureSet(f"{file} {found_problem} ({quoted(error)})") from None


def quoted(error: Exception) -> str:
    """Return the text of an error, on one line of bounded length."""
    return printable(in_words(error))[:MOST_CHARACTERS]


def _map(file: Path) -> tuple[np.ndarray, _Identity]:
    with reading(file), file.open("rb", buffering=0) as stream:
        return mapped.whole(stream), _identity(os.fstat(stream.fileno()))


def _identity(found: os.stat_result) -> _Identity:
    """Return values that change when a file is replaced or written."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
