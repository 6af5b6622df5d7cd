"""Files and folders that appear whole or not at all, whatever happens to the process that fills them.

Nothing is ever written in place: DVC links its cache into the project, and a file changed there would change in the
cache, and in every other place that links to it.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import PipelineError


@contextlib.contextmanager
def folder_in_place_of(path: Path) -> Iterator[Path]:
    """An empty folder to fill; it takes `path`'s place if the block ends well, and vanishes if it does not.

    It is `path` with ".tmp" added; what a killed process left there is removed. The files put into it must have been
    synced. For an instant between two renames nothing stands at `path`.

    Raises:
        PipelineError: another process fills it, or a write failed; what stood at `path` is kept.
    """
    staging, old = path.with_name(f"{path.name}.tmp"), path.with_name(f"{path.name}.old")
    staging.mkdir(parents=True, exist_ok=True)
    handle = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PipelineError(f"another process is writing {path}: wait until it has ended") from None
        try:
            for leftover in staging.iterdir():
                leftover.unlink()
            yield staging
            os.fsync(handle)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError | RuntimeError):  # h5py's, when a write fails
                raise PipelineError(f"{path} cannot be written ({in_words(error)}): what was there is kept") from error
            raise
        shutil.rmtree(old, ignore_errors=True)
        if os.path.lexists(path):
            path.replace(old)
        staging.replace(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8, in place of what stood there."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in place of what stood there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def in_words(error: Exception) -> str:
    """The system's reason where there is one, else what h5py says, on one line."""
    causes = [error, error.__context__]
    codes = [cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno is not None]
    return os.strerror(codes[0]) if codes else " ".join(str(error).split())
