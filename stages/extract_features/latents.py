"""Latents cached for the next extraction, by `runtime.cache_latents`.

A sweep of timesteps or layers then encodes each image once: at Stable Diffusion's size that costs more than a pass.
The cache changes speed, never results: latents are stored as computed, in float32, under all that determines them.
"""

import logging
from pathlib import Path

from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.io.resumable import ResumableStore
from pipeline.io.system_errors import SystemRefusal

log = logging.getLogger(__name__)


class LatentCache:
    """Latents of a data set, one unit per shard."""

    def __init__(self, folder: Path | None) -> None:
        """Cache in `folder`; None disables the cache."""
        self._store = ResumableStore(folder) if folder else None

    def load(self, shard: int) -> Tensor | None:
        """Return the latents, float32 (n, C, h, w) on the CPU; None, with a warning, if they cannot be read."""
        try:
            unit = self._store.load(f"latents-{shard:05d}") if self._store else None
        except SystemRefusal as refused:
            log.warning("%s Encoding its images again.", refused)
            return None
        return unit[0]["latents"] if unit else None

    def save(self, shard: int, latents: Tensor) -> None:
        """Store latents; a failure is only a warning, because they can be recomputed."""
        if self._store:
            try:
                self._store.save(f"latents-{shard:05d}", {"latents": latents})
            except (PipelineError, OSError) as error:
                log.warning("Latents are not cached for the next extraction. %s", error)
