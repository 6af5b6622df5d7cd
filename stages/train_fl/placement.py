"""Where a run's samples are kept: on the device, in host memory, or on disk, to be read batch by batch.

Samples go to the fastest location with enough memory; a slower one is logged. Placement never affects results. Three
quarters of the free memory may be used; the rest is for the model, its gradients and activations.
"""

import logging
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from pipeline import memory
from pipeline.text import size

log = logging.getLogger(__name__)

Place = Literal["device", "host", "disk"]
_USABLE_SHARE = 0.75


@dataclass(frozen=True)
class Sizes:
    """Bytes of the clients' images, of their guidance targets (0 without guidance), and of the held-out images."""

    images: int
    guidance: int
    held_out: int


@dataclass(frozen=True)
class Placement:
    """The place of each part of `Sizes`."""

    images: Place
    guidance: Place
    held_out: Place


# What stays in memory if not everything fits, first what costs the least time: targets are checked and scaled as they
# are read, images only copied, and held-out images are read completely after every round.
_KEPT = (("images", "held_out"), ("guidance", "held_out"), ("held_out",), ())


def choose(sizes: Sizes, device_free: int | None, host_free: int, trains_here: bool = True) -> Placement:
    """Choose the fastest locations with enough free memory, in bytes.

    `device_free` is None if the device uses the host's memory, which is then "device". Without `trains_here`, clients'
    samples are only evaluated: they need not be on the device.
    """
    parts = asdict(sizes)
    if device_free is None:
        return _on_host(parts, "device", host_free)
    room = _USABLE_SHARE * device_free
    if trains_here and sum(parts.values()) <= room:
        return Placement("device", "device", "device")
    if sizes.held_out > room:
        return _on_host(parts, "host", host_free)
    clients = _on_host(parts | {"held_out": 0}, "host", host_free)
    return Placement(clients.images, clients.guidance, "device")


def _on_host(parts: dict[str, int], memory_of_host: Place, free: int) -> Placement:
    for kept in (tuple(parts), *_KEPT):
        if sum(parts[name] for name in kept) <= _USABLE_SHARE * free:
            break
    return Placement(**{name: memory_of_host if name in kept or not parts[name] else "disk" for name in parts})


def place(sizes: Sizes, device: str, trains_here: bool = True) -> Placement:
    """Choose for this machine, and log what could be faster with more memory."""
    device_free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else None
    host_free = memory.available()
    chosen = choose(sizes, device_free, host_free, trains_here)
    words = {"disk": "are read from disk batch by batch", **({"host": "stay in host memory"} if trains_here else {})}
    names = {"images": "images", "guidance": "guidance targets", "held_out": "held-out images"}
    lines = [
        f"{size(count)} of {names[name]} {words[where]}"
        for name, count in asdict(sizes).items()
        if (where := getattr(chosen, name)) in words and count
    ]
    if lines:
        free = f"{size(host_free)} of memory" + (f" and {size(device_free)} of {device}" if device_free else "")
        log.warning("%s (free: %s)", "; ".join(lines), free)
    return chosen
