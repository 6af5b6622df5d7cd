"""Errors of the operating system, which do not concern a file's content, and what to do about each.

A file that is open for writing elsewhere, a missing permission or a full descriptor table stops a read before any byte
was compared. Every reader asks `refusal` first and calls a file damaged only if this returns None.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import PipelineError

_NOT_REFUSED = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EINVAL}
)
"""These mean that there is no such file, that it is something else, or (EINVAL) that a damaged file refers to an
impossible position. Each reader reports that in its own words."""

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
"""Errors that file systems without file locks give when a lock is requested."""

_SET_NO_LOCKS = "The file system has no file locks. Set the environment variable HDF5_USE_FILE_LOCKING=FALSE"
_REMEDIES = (
    dict.fromkeys(
        (errno.EAGAIN, errno.EWOULDBLOCK, errno.EBUSY, errno.ETXTBSY, errno.EDEADLK),
        "Another process, for example a notebook, has it open for writing. Close it there and run again. The file is "
        "not known to be damaged",
    )
    | dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "Raise the limit on open files, for example with `ulimit -n 4096`, and run again"
    )
    | dict.fromkeys((errno.EACCES, errno.EPERM), "Check the permissions of the file and its folders")
    | dict.fromkeys(
        (errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EHOSTDOWN),
        "Check the disk, or the mount of the network file system, and run again",
    )
    | {errno.ENOMEM: "Free some memory and run again"}
    | dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room on the disk and run again")
    | {errno.EROFS: "Mount the file system for writing, or use another, and run again", errno.ENOLCK: _SET_NO_LOCKS}
)
_UNMARK = (
    "A process has it open, or was killed while it wrote. Close it there. If no such process runs, get a copy with "
    "`dvc pull`, or remove the mark with `h5clear -s FILE`"
)
_NUMBER = re.compile(r"\b(?:errno = |os error |code: )(\d+)")
"""The errno in the text of an error of HDF5 or safetensors."""

_OPEN_FOR_WRITING = re.compile(r"file is already open for (write|read-only|SWMR)", re.IGNORECASE)
_NOT_LOCKED = "unable to lock file"


class SystemRefusal(PipelineError):
    """The operating system refused to read a file; its content is unknown, not damaged."""

    def __init__(self, path: Path, reason: str, remedy: str, others: int = 0) -> None:
        """Say that `path` and `others` more files cannot be read, why, and what to do."""
        files = f"{path} and {others} more" if others else f"{path}"
        super().__init__(f"{files} cannot be read ({reason}). {remedy}.")
        self.path, self.reason, self.remedy = path, reason, remedy


def refusal(error: BaseException, path: Path) -> SystemRefusal | None:
    """Return the error to raise if the operating system refused to read `path`.

    The exception may have any type, because h5py gives some errno only in a RuntimeError's text. Return None if it
    concerns the content of the file, or there is no such file.
    """
    code = error_number(error)
    if code is not None and (code not in _NOT_REFUSED or _NOT_LOCKED in str(error)):
        no_locks = code in NO_LOCKS and _NOT_LOCKED in str(error)
        return SystemRefusal(path, os.strerror(code), _SET_NO_LOCKS if no_locks else remedy(code))
    if isinstance(error, MemoryError):
        return SystemRefusal(path, "out of memory", remedy(errno.ENOMEM))
    if code is None and isinstance(error, OSError | RuntimeError) and _OPEN_FOR_WRITING.search(str(error)):
        if "h5clear" in str(error):
            return SystemRefusal(path, "it is marked as open for writing", _UNMARK)
        return SystemRefusal(path, "it is open for writing", remedy(errno.EAGAIN))
    return None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to read `path` into SystemRefusal; other errors pass unchanged."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if refused := refusal(error, path):
            raise refused from None
        raise


def status(path: Path) -> os.stat_result | None:
    """Return the status of the file at `path`, following links; None only if there is no file.

    In some versions of Python, `Path.exists` and `Path.is_file` return False if permission is missing; this raises
    SystemRefusal.
    """
    with reading(path):
        try:
            return path.stat()
        except OSError as error:
            if error.errno in _NOT_REFUSED:
                return None
            raise


def entries(folder: Path) -> list[Path]:
    """Return the paths in a folder, by name; none if there is no such folder. `Path.glob` skips unreadable folders."""
    with reading(folder):
        try:
            return sorted(folder.iterdir())
        except OSError as error:
            if error.errno in _NOT_REFUSED:
                return []
            raise


def unwritten(path: Path, error: BaseException) -> PipelineError:
    """Return the error to raise if an atomic write of `path` ended in `error`."""
    advice = remedy(error_number(error) or 0)
    return PipelineError(
        f"{path} cannot be written ({in_words(error)}). {advice}. An earlier version, if there was one, is unchanged."
    )


def in_words(error: BaseException) -> str:
    """Return the operating system's reason if there is one, else the text of the error, on one line."""
    code = error_number(error)
    return os.strerror(code) if code else " ".join(str(error).split())


def remedy(code: int) -> str:
    """Return what to do about an errno, as a sentence without its period."""
    return _REMEDIES.get(code, "Remove the cause and run again")


def error_number(error: BaseException) -> int | None:
    """Return the errno of an error or of its cause; None if there is none."""
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.errno:
            return cause.errno
        if cause is None or isinstance(cause, ValueError):  # of a parser, whose text quotes the file
            continue
        if (found := _NUMBER.search(str(cause))) and int(found[1]):
            return int(found[1])
    return None
