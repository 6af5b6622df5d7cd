"""What a process uses, measured on itself, for the estimates of `--dry-run`."""

import os
import resource
import shutil
from pathlib import Path

from pipeline import memory
from pipeline.text import size


def of_process(device: str, more_bytes: int = 0, more_device_bytes: int = 0, more_descriptors: int = 0) -> list[str]:
    """Describe the memory that this process will need, and the descriptors that it will have open.

    Args:
        device: The device that it computes on.
        more_bytes: The memory that it will need beyond what it has needed so far.
        more_device_bytes: The same, of a GPU.
        more_descriptors: Those that it will open for other processes.
    """
    import matplotlib.figure  # noqa: F401 (a stage draws figures at its end, and the library takes 50 MB)

    used = f"{size(memory.peak() + more_bytes)} per process, with the libraries"
    if device.startswith("cuda"):
        import torch

        used += f"; {size(torch.cuda.max_memory_allocated(device) + more_device_bytes)} of {device}"
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    now = Path("/dev/fd")
    opened = f"about {len(os.listdir(now)) + more_descriptors}" if now.exists() else "unknown"
    limit = "any number" if allowed == resource.RLIM_INFINITY else str(allowed)
    free = memory.available()
    return [
        f"memory        {used} ({'unknown' if free == memory.UNLIMITED else size(free)} are free)",
        f"descriptors   {opened} of {limit}",
    ]


def free_space(folder: Path) -> str:
    """Describe the free space of the disk that has, or will have, a folder."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{size(shutil.disk_usage(existing).free)} are free"
