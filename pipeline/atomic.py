"""Files and folders that appear whole or not at all, whatever happens to the process that fills them.

Nothing is ever written in place: DVC links its cache into the project, and a file changed there would change in the
cache, and in every other place that links to it.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.locks import try_flock
from pipeline.system_errors import unwritten


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
        if not try_flock(handle, staging):
            raise PipelineError(f"another process is writing {path}: wait until it has ended")
        try:
            for leftover in staging.iterdir():
                remove(leftover)
            yield staging
            os.fsync(handle)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError | RuntimeError):  # h5py's, when a write fails
                raise unwritten(path, error) from error
            raise
        remove(old)
        if os.path.lexists(path):
            path.replace(old)
        staging.replace(path)
        sync(path.parent)
        remove_replaced(path)
    finally:
        os.close(handle)


def remove_replaced(path: Path) -> None:
    """Removes the folder that `path` took the place of, if the process was killed before it could do so itself."""
    with contextlib.suppress(OSError):
        remove(path.with_name(f"{path.name}.old"))


def write_text(path: Path, text: str) -> None:
    """Writes a text file, UTF-8, in place of what stood there.

    Raises:
        PipelineError: it cannot be written; what stood there is kept.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in place of what stood there.

    Raises:
        PipelineError: it cannot be written; what stood there is kept.
    """
    with whole_or_not_at_all(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def whole_or_not_at_all(path: Path) -> Iterator[Path]:
    """A temporary name for a file; it takes `path`'s place if the block ends well, and vanishes if it does not.

    Raises:
        PipelineError: it cannot be written; what stood there is kept.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritten(path, error) from None
        raise


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
