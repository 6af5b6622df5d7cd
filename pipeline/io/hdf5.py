"""Read only plain, contiguous HDF5 datasets, because files may come from untrusted sources, and not while they change.

While a process has a file open for writing, its bytes on the disk may be in between two states, and HDF5 holds a lock
(flock). So a file is compared with its checksum only under a shared lock. Finished files never change: on a file system
without locks, they are read without one.

The format also has datasets that

- are stored in other files (external links and storage, virtual datasets),
- expand to a thousand times the size of their file (never written, or compressed),
- hold pointers (text of variable length, references), which a memory map would follow.
"""

import contextlib
import fcntl
import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import h5py

from pipeline.io.system_errors import NO_LOCKS, error_number, reading


def plain_dataset(h5: h5py.File, name: str, file: Path) -> h5py.Dataset:
    """Return the contiguous dataset of numbers at `name` ("/" between groups) of `h5`; its bytes must be in `file`.

    Links are rejected before they are followed. Raise KeyError if there is no such dataset, ValueError if it is
    anything else; the message says what.
    """
    for path in itertools.accumulate(name.split("/"), "{}/{}".format):
        link = h5.get(path, getlink=True)
        if link is None:
            raise KeyError(f"{path} is missing")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{path} is a link to another place")
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
        raise ValueError(f"dataset {name} extends beyond the end of the file")
    return dataset


@contextlib.contextmanager
def open_to_read(file: Path) -> Iterator[h5py.File]:
    """Yield an open HDF5 file; no process can open it for writing during the block.

    Raise SystemRefusal if the operating system refused, OSError if the file is missing or incomplete.
    """
    with reading(file):
        h5 = None
        try:
            h5 = h5py.File(file, "r")  # with locks, unless HDF5_USE_FILE_LOCKING says otherwise
        except OSError as error:
            if error_number(error) not in NO_LOCKS:
                raise
        with h5 or h5py.File(file, "r", locking=False) as h5:  # outside the handler, which would chain the errors
            yield h5


@contextlib.contextmanager
def bytes_of(file: Path) -> Iterator[BinaryIO]:
    """Yield an HDF5 file as a stream of bytes, like `open_to_read`."""
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
        """Read an open file from its start."""
        stream.seek(0)
        self._stream, self._position = stream, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, block: Any) -> int:
        """Read the next bytes, with the flags cleared."""
        view = memoryview(block).cast("B")
        size = self._stream.readinto(view)  # type: ignore[attr-defined]
        for place in range(max(20, self._position), min(24, self._position + size)):
            view[place - self._position] = 0
        self._position += size
        return size


def check_not_written(file: Path) -> None:
    """Raise SystemRefusal if a process has a file open for writing: it may differ without being damaged."""
    with contextlib.suppress(OSError), reading(file), file.open("rb") as stream:  # suppressed: there is no such file
        _share(stream)


def _share(stream: BinaryIO) -> None:
    """Acquire a shared lock, which blocks only writers; do without on a file system that has no locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
