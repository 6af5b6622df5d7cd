"""Where a run's samples are kept: on the device, in host memory, or (guidance) in the feature set's shards.

Samples go to the fastest location with enough memory; a slower one is logged. Placement never affects results. Three
quarters of the free memory may be used; the rest is for the model, its gradients and activations.
"""

import logging
import re
from pathlib import Path
from typing import Literal

import torch

log = logging.getLogger(__name__)

Placement = Literal["device", "host", "shards"]
_USABLE_SHARE = 0.75


def choose(image_bytes: int, guidance_bytes: int, device_free: int | None, host_free: int) -> Placement:
    """Choose the fastest location with enough free memory, in bytes: "shards" keeps the images in host memory.

    `guidance_bytes` is 0 for methods without guidance, and `device_free` None if the device is the host itself.
    """
    total = image_bytes + guidance_bytes
    if device_free is not None and total <= _USABLE_SHARE * device_free:
        return "device"
    if total <= _USABLE_SHARE * host_free or not guidance_bytes:
        return "device" if device_free is None else "host"
    return "shards"


def place(image_bytes: int, guidance_bytes: int, device: str) -> Placement:
    """Choose for this machine, and warn if the data do not fit on the device."""
    device_free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else None
    chosen = choose(image_bytes, guidance_bytes, device_free, _host_free())
    if chosen != "device":
        where = "stay in host memory" if chosen == "host" else "are read from the shards batch by batch"
        log.warning("%.1f GB of samples do not fit on %s: they %s", (image_bytes + guidance_bytes) / 1e9, device, where)
    return chosen


def _host_free() -> int:
    """Return the bytes that the kernel can give without swapping."""
    file = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable: *(\d+) kB", file.read_text() if file.exists() else "", re.MULTILINE)
    return int(found[1]) * 1024 if found else 2**63  # not Linux: leave it to the operating system
