"""Opening HDF5 files that others wrote: not while somebody writes them, and not what they may hold beyond numbers.

While a process has a file open for writing, its bytes on the disk may differ from those before and after, and HDF5
holds a lock (flock). So a file is compared with its checksum only under a lock of ours, shared with other readers.
Finished files never change: where the file system has no locks, they are read without.

The format knows datasets that stand in other files (external links and storage, virtual datasets), that take a
thousand times their file's room (never written, or compressed), and elements that are pointers (text of variable
length, references), which, mapped into memory, would be followed.
"""

import contextlib
import fcntl
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import h5py

from pipeline.io.system_errors import NO_LOCKS, error_number, reading


def plain_dataset(h5: h5py.File, name: str, file: Path) -> h5py.Dataset:
    """A dataset of numbers, contiguous, all in this file; links are refused before they are followed.

    Args:
        h5: the open file.
        name: of the dataset, "/" between groups.
        file: the file that must hold its bytes.

    Raises:
        KeyError: there is none.
        ValueError: it is something else; says what.
    """
    parts = name.split("/")
    for stop in range(1, len(parts) + 1):
        path = "/".join(parts[:stop])
        link = h5.get(path, getlink=True)
        if link is None:
            raise KeyError(f"there is no {path}")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{path} is a link to somewhere else")
    dataset = h5[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise ValueError(f"{name} is not a dataset")
    if dataset.dtype.kind not in "iuf":
        raise ValueError(f"dataset {name} holds {dataset.dtype}, not numbers")
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"the bytes of {name} are in another file")
    offset = dataset.id.get_offset()
    if offset is None:
        raise ValueError(f"dataset {name} is not contiguous")
    if offset + dataset.nbytes > file.stat().st_size:
        raise ValueError(f"dataset {name} goes beyond the end of the file")
    return dataset


@contextlib.contextmanager
def open_to_read(file: Path) -> Iterator[h5py.File]:
    """An HDF5 file; no process can open it for writing meanwhile.

    Raises:
        SystemRefusal: the operating system refused, for example because a process has it open for writing.
        OSError: there is no such file, or it is not a whole HDF5 file.
    """
    with reading(file):
        locking = None  # HDF5's own default, which the environment variable HDF5_USE_FILE_LOCKING sets
        try:
            h5 = h5py.File(file, "r")
        except OSError as error:
            if error_number(error) not in NO_LOCKS:
                raise
            locking = False
        if locking is False:  # not in the handler: the error of the first try would be taken for the second's cause
            h5 = h5py.File(file, "r", locking=False)
        with h5:
            yield h5


@contextlib.contextmanager
def bytes_of(file: Path) -> Iterator[BinaryIO]:
    """The bytes of an HDF5 file; no process can open it for writing meanwhile.

    Raises:
        SystemRefusal: it cannot be opened, for example because a process has it open for writing.
        OSError: there is no such file.
    """
    with contextlib.ExitStack() as stack:
        with reading(file):
            stream = stack.enter_context(file.open("rb"))
            if os.environ.get("HDF5_USE_FILE_LOCKING", "").upper() not in ("FALSE", "0"):
                _share(stream)
        yield stream


class Unmarked(io.RawIOBase):
    """The bytes of an HDF5 file as they were before a process opened it for writing and was killed.

    Opening sets the consistency flags in the superblock (bytes 20 to 23 in versions 0 and 1, which h5py writes), and
    closing clears them; nothing else changes if nothing was written.
    """

    def __init__(self, stream: BinaryIO) -> None:
        """Of an open file, from its start."""
        super().__init__()
        stream.seek(0)
        self._stream, self._position = stream, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, block: Any) -> int:
        """Reads the next bytes, with the flags cleared."""
        view = memoryview(block).cast("B")
        size = self._stream.readinto(view)  # type: ignore[attr-defined]
        for place in range(max(20, self._position), min(24, self._position + size)):
            view[place - self._position] = 0
        self._position += size
        return size


def check_not_written(file: Path) -> None:
    """Asked before a file is called damaged, whether HDF5 uses locks here or not.

    Raises:
        SystemRefusal: a process has it open for writing, so that its bytes say nothing.
    """
    with contextlib.suppress(OSError), reading(file), file.open("rb") as stream:  # suppressed: there is no such file
        _share(stream)


def _share(stream: BinaryIO) -> None:
    """Takes a lock that keeps writers out and readers not; none where the file system has none."""
    try:
        fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
