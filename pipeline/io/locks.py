"""Exclusive locks between processes, which name their holder.

The operating system holds them (flock, by filelock), so the lock of a killed process is free at once. A lock file stays
after its release: removing one could give two processes the same lock.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import PipelineError
from pipeline.io.system_errors import NO_LOCKS, unwritten


class Lock:
    """An exclusive lock on a file, which is created if missing; see `opened`."""

    def __init__(self, file: Path) -> None:
        """Prepare the lock without acquiring it."""
        self.file = file
        self._lock = FileLock(file, blocking=False, fallback_to_soft=False)

    def acquire(self) -> bool:
        """Try to acquire the lock, without waiting, and return whether it is held now.

        Raise PipelineError if the file system has no locks, or the lock file cannot be opened.
        """
        try:
            self._lock.acquire()
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise unwritten(self.file, error) from None
            raise PipelineError(
                f"{self.file} cannot be locked ({error.strerror}). File locks keep two processes from writing the same "
                "files. Put the project on a file system that has them, or mount this one with them."
            ) from None
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        with contextlib.suppress(OSError):  # a full disk does not weaken the lock
            self.file.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}", encoding="utf-8")
        return True

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._lock.release()

    def holder(self) -> str:
        """Return who holds the lock, as the holder wrote it down."""
        with contextlib.suppress(OSError):
            if written := self.file.read_text(encoding="utf-8", errors="replace")[:200].strip():
                return written
        return "another process"


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Lock]:
    """Yield the lock of `file`, not acquired yet, and release it at the end. Creates the folder if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(file)
    try:
        yield lock
    finally:
        lock.release()


@contextlib.contextmanager
def waited_for(file: Path) -> Iterator[None]:
    """Hold the lock of `file` after waiting for other processes, which hold it for moments only."""
    with opened(file) as lock:
        while not lock.acquire():
            time.sleep(0.01)
        yield


@contextlib.contextmanager
def held(file: Path, what: str) -> Iterator[None]:
    """Hold the lock of `file`, which protects `what`; PipelineError, naming both, if another process has it."""
    with opened(file) as lock:
        if not lock.acquire():
            raise PipelineError(f"{what} is being written by {lock.holder()}. Wait until it has ended, or stop it.")
        yield
