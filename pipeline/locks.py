"""Locks between processes that name their holder: process, host, and since when.

They are the system's own (flock), so one whose holder was killed is free at once, whatever its file still says. The
files stay: removing one would let two processes hold what they take for the same lock.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import PipelineError


def try_flock(handle: int, path: Path, shared: bool = False) -> bool:
    """Takes the system's lock of an open file or folder; whether it is ours now.

    Args:
        handle: its descriptor.
        path: its path, for the message.
        shared: exclude only those who want it for themselves.

    Raises:
        PipelineError: it cannot be locked, as on a file system that has no locks.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise PipelineError(
            f"{path} cannot be locked ({error.strerror}). File locks keep two processes from writing the same files. "
            "Put the project on a file system that has them, or mount this one with them."
        ) from None
    return True


class Lock:
    """The lock of a file that is open."""

    def __init__(self, handle: int, file: Path) -> None:
        """Of the open `handle` to `file`."""
        self._handle, self._file = handle, file

    def take(self, shared: bool = False) -> bool:
        """Whether it is ours now; `shared` excludes only those who want it for themselves.

        Raises:
            PipelineError: the file system has no locks.
        """
        if not try_flock(self._handle, self._file, shared):
            return False
        if shared:
            return True
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        with contextlib.suppress(OSError):  # on a full disk it locks all the same
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode(), 0)
        return True

    def holder(self) -> str:
        """Who holds it, as they wrote it down."""
        return os.pread(self._handle, 200, 0).decode(errors="replace").strip() or "another process"


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Lock]:
    """The lock of this file, not taken yet; let go at the end. The folder is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield Lock(handle, file)
    finally:
        os.close(handle)


@contextlib.contextmanager
def held(file: Path, what: str) -> Iterator[None]:
    """Holds the lock of this file for the block.

    Args:
        file: the lock's file.
        what: is done under it, for the message.

    Raises:
        PipelineError: another process holds it; names it.
    """
    with opened(file) as lock:
        if not lock.take():
            raise PipelineError(f"{what} is being made by {lock.holder()}: wait until it has ended, or end it")
        yield
