"""The memory that a process can still use, and what it does with freed memory.

A process can use the least of what the machine, the control groups of a container or batch job, and its own limits
leave. Pages of files count as free: the kernel drops them when it needs memory.
"""

import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

UNLIMITED = 2**63
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
MALLOC = {"MALLOC_TRIM_THRESHOLD_": 512 << 20, "MALLOC_MMAP_THRESHOLD_": 32 << 20}
"""The settings of `keep_freed` in bytes, by the environment variables with which other programs get the same."""


def available(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still use without swapping; `UNLIMITED` if the system does not say.

    Args:
        root: The folder with `proc` and `sys/fs/cgroup`.
    """
    return max(0, min([*_of_machine(root), *_of_groups(root), *_of_limits(root)], default=UNLIMITED))


def keep_freed() -> None:
    """Keep freed memory for the next allocation, with glibc and unless the user's environment says otherwise.

    A training step allocates megabytes and frees them. glibc returns them to the system, which then clears every page
    that it gives again: a tenth of the time of a run of the small CNN. From now on it returns blocks of more than 32
    MiB, and the end of the heap if more than 512 MiB are free there. Forked child processes inherit it.
    """
    if MALLOC.keys() & os.environ.keys() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc: neither macOS nor musl has it
    if mallopt:
        mallopt(_TRIM_THRESHOLD, MALLOC["MALLOC_TRIM_THRESHOLD_"])
        mallopt(_MMAP_THRESHOLD, MALLOC["MALLOC_MMAP_THRESHOLD_"])  # larger blocks are returned at once


def peak() -> int:
    """Return the most bytes that this process has occupied at once, with the libraries and mapped pages of files."""
    if found := _kilobytes(_text(Path("/proc/self/status")), "VmHWM"):
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux, it includes the process that started this one
    return most if sys.platform == "darwin" else most * 1024


def anonymous() -> int | None:
    """Return the bytes that this process occupies now without pages of files; None if the system does not say."""
    return _kilobytes(_text(Path("/proc/self/status")), "RssAnon")


def _of_machine(root: Path) -> Iterator[int]:
    if (found := _kilobytes(_text(root / "proc/meminfo"), "MemAvailable")) is not None:
        yield found


def _of_groups(root: Path) -> Iterator[int]:
    """Yield what the limit of each control group leaves: of the process's own and of those above it.

    A container may see the path of its group on the host, which does not exist inside; there its group is the topmost.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, below a folder of its own where both versions are mounted
            mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
            limit, used, prefix = "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            mounts, limit, used, prefix = ["sys/fs/cgroup/memory"], *_VERSION_1
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        for folder in (root / mount / group for mount in mounts for group in (own, *own.parents)):
            most, now = _text(folder / limit).strip(), _text(folder / used).strip()
            if most.isdecimal() and now.isdecimal():  # "max": no limit
                pattern = rf"^{prefix}(?:in)?active_file (\d+)$"
                files = sum(map(int, re.findall(pattern, _text(folder / "memory.stat"), re.MULTILINE)))
                yield int(most) - int(now) + files


_VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"


def _of_limits(root: Path) -> Iterator[int]:
    """Yield what `ulimit -v` and `ulimit -d` leave."""
    status = _text(root / "proc/self/status")
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and (found := _kilobytes(status, used)) is not None:
            yield most - found


def _kilobytes(text: str, name: str) -> int | None:
    """Return the bytes of a line of /proc such as "VmSize:  12 kB"; None if there is none."""
    found = re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _text(file: Path) -> str:
    """Return a file's text; nothing if it cannot be read, as on another system or in a restricted container."""
    try:
        return file.read_text()
    except OSError:
        return ""
