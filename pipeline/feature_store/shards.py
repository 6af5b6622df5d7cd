"""The shards of a set as arrays in memory maps, however many there are, on a few open files.

A map holds a descriptor for as long as it is there, and systems allow a process 256 to 1,024 of them. So of each shard
only the layout is kept, and of the maps those that were used last: opening one again takes microseconds, against
milliseconds for HDF5. A map that is dropped is closed with the last array that looks into it.
"""

import contextlib
import mmap
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from pipeline.feature_store.schema import FIELDS, Fault, Manifest
from pipeline.io.hdf5 import check_not_written, open_to_read, plain_dataset
from pipeline.io.system_errors import in_words, reading
from pipeline.text import printable

MALFORMED = (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError)  # what h5py raises
_DATASETS = {**FIELDS, "crc32": "<u4"}
_SHARE = 8  # a set takes an eighth of the descriptors that a process may have
_FEWEST, _MOST = 8, 64
_LONGEST = 200  # characters of what a file says of itself, in an error


_Identity = tuple[int, ...]


@dataclass(frozen=True)
class _Dataset:
    """Where a dataset lies in its file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def of(self, content: mmap.mmap) -> np.ndarray:
        """A read-only array in the map; fancy indexing through h5py is a hundred times slower."""
        return np.ndarray(self.shape, self.dtype, content, self.offset)


class Shards:
    """The shards of one set. Safe to use from several threads, and after a fork: no HDF5 handle stays open."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Those in folder `path`."""
        self._path, self._manifest = path, manifest
        self._layouts: dict[int, tuple[_Identity, dict[str, _Dataset]]] = {}
        self._maps: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._room = max(_FEWEST, min(_MOST, _descriptors() // _SHARE))
        self._lock = threading.Lock()

    def open(self, shard: int) -> dict[str, np.ndarray]:
        """The shard's datasets.

        Raises:
            Fault: the file is missing, not a whole HDF5 file, another set's, or not laid out as a shard.
            SystemRefusal: the operating system did not let it be read.
        """
        with self._lock:
            if shard in self._maps:
                self._maps.move_to_end(shard)
                return self._maps[shard]
        file = self._checked_file(shard)
        content, identity = _map(file)
        maps = {name: dataset.of(content) for name, dataset in self._layout(shard, file, identity).items()}
        with self._lock:
            self._maps[shard] = maps
            if len(self._maps) > self._room:
                self._maps.popitem(last=False)
        return maps

    def check(self, shard: int) -> None:
        """Reads the shard's layout, once; raises what `open` raises."""
        if shard not in self._layouts:
            file = self._checked_file(shard)
            with reading(file):
                identity = _identity(file.stat())
            self._layout(shard, file, identity)

    def _layout(self, shard: int, file: Path, identity: _Identity) -> dict[str, _Dataset]:
        """The layout of the file that is of this identity: one that took its place may be another set's."""
        if shard not in self._layouts or self._layouts[shard][0] != identity:
            self._layouts[shard] = (identity, self._read_layout(shard, file))
        return self._layouts[shard][1]

    def shapes(self, n: int) -> dict[str, tuple[int, ...]]:
        """Of the datasets of n rows."""
        p, d = self._manifest.prompts_per_image, self._manifest.content.num_dims
        of_rows = dict.fromkeys(("index", "label", "crc32"), (n,))
        return {**of_rows, "denoised": (n, d), "prompted": (n, p, d), "prompt_class": (n, p)}

    def _checked_file(self, shard: int) -> Path:
        entry = self._manifest.shards[shard]
        if wrong := entry.size_fault(self._path):  # a map of a file that was cut short would end the process
            raise wrong
        return self._path / entry.file

    def _read_layout(self, shard: int, file: Path) -> dict[str, _Dataset]:
        shapes = self.shapes(len(self._manifest.shard_rows(shard)))
        with opened(file, self._manifest.fingerprint, "does not have the layout of a shard") as h5:
            layout = {name: _place(plain_dataset(h5, name, file)) for name in _DATASETS}
            for name, dtype in _DATASETS.items():
                found = layout[name]
                if found.shape != shapes[name] or found.dtype != np.dtype(dtype):
                    raise ValueError(f"{name} is {found.dtype} {found.shape}, not {dtype} {shapes[name]}")
        return layout


@contextlib.contextmanager
def opened(file: Path, fingerprint: str, otherwise: str) -> Iterator[h5py.File]:
    """An HDF5 file of the set of this fingerprint.

    Args:
        file: the file.
        fingerprint: the set's.
        otherwise: what is wrong with the file if the block does not find in it what should be there.

    Raises:
        Fault: it is missing, not a whole HDF5 file or another set's, or the block failed.
        SystemRefusal: the operating system did not let it be read.
    """
    wrong = "is not a whole HDF5 file"
    try:
        with open_to_read(file) as h5:
            found = h5.attrs.get("fingerprint")
            if not isinstance(found, str) or found != fingerprint:
                raise Fault(f"{file} belongs to another feature set (fingerprint differs)")
            wrong = otherwise
            yield h5
    except MALFORMED as error:
        check_not_written(file)
        raise Fault(f"{file} {wrong} ({said(error)})") from None


def said(error: Exception) -> str:
    """What an error says, on one line of bounded length."""
    return printable(in_words(error))[:_LONGEST]


def _place(dataset: h5py.Dataset) -> _Dataset:
    return _Dataset(dataset.id.get_offset(), dataset.shape, dataset.dtype)


def _map(file: Path) -> tuple[mmap.mmap, _Identity]:
    with reading(file), file.open("rb", buffering=0) as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return content, _identity(os.fstat(stream.fileno()))


def _identity(found: os.stat_result) -> _Identity:
    """What is another once a file is replaced or written."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _descriptors() -> int:
    """How many descriptors the process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if soft == resource.RLIM_INFINITY else soft
