"""Where a run's samples live: on the device, in the host's memory, or (guidance) in the feature set's shards.

The nearest place that has room is taken, and a farther one is said aloud, because it costs speed; it never changes a
number. Three quarters of the free memory count as room; the rest is for the model, its gradients and activations.
"""

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.feature_store import FeatureSet
from pipeline.settings.params import Guidance as GuidanceParams
from stages.train_fl.client_data import Guidance
from stages.train_fl.methods import feddifrc

log = logging.getLogger(__name__)

Placement = Literal["device", "host", "shards"]
_ROOM = 0.75


class GuidanceSource:
    """The feature set's representations as targets of training: which layers, on which scale."""

    def __init__(self, features: FeatureSet, params: GuidanceParams) -> None:
        """Reads `features` as `params` wants them."""
        basis = features.basis()
        self._features, self._params = features, params
        self._layers = features.manifest.content.layers
        self._mean, self._std = torch.from_numpy(basis.mean), torch.from_numpy(basis.std)
        self.num_dims = len(feddifrc.columns(params, self._layers))

    def bytes_per_sample(self) -> int:
        """Of the targets in memory: float32, whether a term uses them or not."""
        return (self._features.manifest.prompts_per_image + 1) * self.num_dims * 4

    def read(self, index: np.ndarray) -> Guidance:
        """The targets of the samples `index`, int64 (n,), positions in the training split, in the host's memory."""
        rows = self._features.read(index)
        positive = torch.from_numpy(self._features.positive_prompts(rows))
        cached = Guidance(torch.from_numpy(rows.denoised), torch.from_numpy(rows.prompted), positive)
        return feddifrc.prepare(cached, self._params, self._layers, self._mean, self._std)


class GuidanceOnDisk:
    """Targets of n images, read from the shards' memory maps batch by batch, every row checked as it is read."""

    def __init__(self, source: GuidanceSource, index: np.ndarray) -> None:
        """The samples `index`, int64 (n,), positions in the training split."""
        self._source = source
        self._index = index

    def take(self, index: Tensor) -> Guidance:
        """The rows at `index`, on the CPU."""
        return self._source.read(self._index[index.cpu().numpy()])


def choose(image_bytes: int, guidance_bytes: int, device_free: int | None, host_free: int) -> Placement:
    """The nearest place with room.

    Args:
        image_bytes: of all images.
        guidance_bytes: of all representations; 0 for methods without guidance.
        device_free: free memory of a separate device; None where the device is the host itself.
        host_free: free memory of the host.

    Returns:
        "device" (images and guidance there), "host" (both in the host's memory), or "shards" (images in the host's
        memory, guidance on disk).
    """
    total = image_bytes + guidance_bytes
    if device_free is not None and total <= _ROOM * device_free:
        return "device"
    if total <= _ROOM * host_free or not guidance_bytes:
        return "device" if device_free is None else "host"
    return "shards"


def place(image_bytes: int, guidance_bytes: int, device: str) -> Placement:
    """`choose` for this machine; says so where the data do not fit on the device."""
    device_free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else None
    chosen = choose(image_bytes, guidance_bytes, device_free, _host_free())
    if chosen != "device":
        where = {"host": "stay in the host's memory", "shards": "are read from the shards batch by batch"}[chosen]
        log.warning("%.1f GB of samples do not fit on %s: they %s", (image_bytes + guidance_bytes) / 1e9, device, where)
    return chosen


def _host_free() -> int:
    """Bytes that the kernel can give without swapping."""
    file = Path("/proc/meminfo")
    try:
        lines = file.read_text().splitlines()
    except OSError:  # a hint is all that is wanted
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**63  # not Linux: let the operating system decide
