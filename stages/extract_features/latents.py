"""Latents kept from one extraction for the next, by `runtime.cache_latents`.

A sweep of timesteps or layers then encodes each image once: at Stable Diffusion's size that costs more than a pass.
They are speed, never numbers: float32, as computed, and keyed by all that decides them, down to the device and the
batches, so a feature set is the same with them and without. What is damaged or may not be read is computed again.
"""

import logging
import zlib
from pathlib import Path

import h5py
import numpy as np

from pipeline.io.hdf5 import open_to_read, plain_dataset
from pipeline.io.system_errors import SystemRefusal, in_words

log = logging.getLogger(__name__)


class LatentCache:
    """Latents of a data set, one file a shard; without a folder it keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        """Uses `folder`, which is made when first needed."""
        self._folder = folder

    def load(self, shard: int) -> np.ndarray | None:
        """float32 (n, C, h, w), or None if they are not there whole, or may not be read, which a warning says."""
        if self._folder is None:
            return None
        file = self._file(shard)
        try:
            with open_to_read(file) as h5:
                latents = plain_dataset(h5, "latents", file)[()]
                if h5.attrs["crc32"] == zlib.crc32(latents.data):
                    return latents
            log.warning("%s is damaged: encoding its images again", file)
        except SystemRefusal as refused:
            log.warning("%s Encoding its images again.", refused)
        except FileNotFoundError:
            pass
        except (OSError, KeyError, ValueError, TypeError, RuntimeError):
            log.warning("%s is damaged: encoding its images again", file)
        return None

    def save(self, shard: int, latents: np.ndarray) -> None:
        """Keeps float32 (n, C, h, w); where that fails, says so and goes on: they can be made again."""
        if self._folder is None:
            return
        temporary = self._file(shard).with_suffix(".tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with h5py.File(temporary, "w") as h5:
                h5.create_dataset("latents", data=latents)
                h5.attrs["crc32"] = zlib.crc32(np.ascontiguousarray(latents).data)
            temporary.replace(self._file(shard))
        except (OSError, RuntimeError) as error:  # h5py's, when a write fails
            log.warning("latents are not kept for the next extraction: %s (%s)", self._folder, in_words(error))
            temporary.unlink(missing_ok=True)

    def _file(self, shard: int) -> Path:
        assert self._folder
        return self._folder / f"latents-{shard:05d}.h5"
