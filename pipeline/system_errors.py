"""Errors of the operating system, which say nothing about what a file holds.

A file that is open for writing elsewhere, a missing permission or a full descriptor table stops a read before any byte
was compared. Every reader asks `refusal` first and calls a file damaged only if this returns None.
"""

import errno
import os
import re
from pathlib import Path

from pipeline.errors import PipelineError

_ABOUT_THE_PATH = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO})
"""These say that no such file is there (or something else is), which each reader reports in its own words."""

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})
_REMEDIES = (
    dict.fromkeys(
        (errno.EAGAIN, errno.EWOULDBLOCK, errno.EBUSY, errno.ETXTBSY, errno.EDEADLK),
        "Another process, for example a notebook, has it open for writing. Close it there and run again; nothing is "
        "known to be damaged",
    )
    | dict.fromkeys(
        _NO_LOCKS, "The file system has no file locks. Set the environment variable HDF5_USE_FILE_LOCKING=FALSE"
    )
    | dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "Raise the limit on open files, for example with `ulimit -n 4096`, and run again"
    )
    | dict.fromkeys((errno.EACCES, errno.EPERM), "Check the permissions of the file and its folders")
    | dict.fromkeys(
        (errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EHOSTDOWN),
        "Check the disk, or the mount of the network file system, and run again",
    )
    | dict.fromkeys((errno.ENOMEM,), "Free some memory and run again")
)
_DEFAULT_REMEDY = "Nothing is known to be damaged. Remove the cause and run again"
_OPEN_FOR_WRITING = re.compile(r"file is already open for (write|read-only)|unable to lock file", re.IGNORECASE)


class SystemRefusal(PipelineError):
    """The operating system did not let a file be read; its content is unknown, not damaged."""


def refusal(error: BaseException, path: Path) -> SystemRefusal | None:
    """The error to raise if the operating system refused to read `path`.

    Args:
        error: what reading raised, of any type: h5py gives some errno only in the text of a RuntimeError.
        path: the file or folder that was read.

    Returns:
        None if the error is about the content of the file, or about a path where no such file is.
    """
    code = error_number(error)
    if code is not None and code not in _ABOUT_THE_PATH:
        remedy = _REMEDIES.get(code, _DEFAULT_REMEDY)
        return SystemRefusal(f"{path} cannot be read ({os.strerror(code)}). {remedy}.")
    if isinstance(error, MemoryError):
        return SystemRefusal(f"{path} cannot be read (out of memory). {_REMEDIES[errno.ENOMEM]}.")
    if code is None and isinstance(error, OSError | RuntimeError) and _OPEN_FOR_WRITING.search(str(error)):
        return SystemRefusal(f"{path} cannot be read (it is open for writing). {_REMEDIES[errno.EAGAIN]}.")
    return None


def error_number(error: BaseException) -> int | None:
    """The errno of an error, or of what caused it; None if there is none."""
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.errno:
            return cause.errno
        if cause is not None and (found := re.search(r"\berrno = (\d+)", str(cause))) and int(found[1]):
            return int(found[1])
    return None
