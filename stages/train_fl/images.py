"""Images that stay in their data set's memory map and are read when they are needed.

A memory map's pages are those of the kernel's cache of files, which all processes share and which are dropped when
memory is needed for anything else. Pages that were read are taken out of this process at once: otherwise the images,
and the tables that address their pages, would appear as memory of every process that trains.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline import threads

_BLOCK = 2**22  # bytes that are copied at a time: they stay in the processor's cache until their axes are swapped
_AROUND = 2**21  # bytes that the kernel may map at once around a page that is read: a huge page
_FEW = 2**26  # bytes of addresses that are searched for pages quickly


@dataclass(frozen=True)
class ImagesOnDisk:
    """n images on disk; indexed, split and copied like a tensor uint8 (n, 3, H, W).

    Attributes:
        stores: uint8 (N, H, W, 3) each, memory maps of images of one size.
        rows: int64 (n,), the positions of the images in the stores, counted from one store to the next.
    """

    stores: tuple[np.ndarray, ...]
    rows: np.ndarray

    def __len__(self) -> int:
        """Return the number of images, n."""
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Read the images at the positions `index`, int64 (b,), into host memory: uint8 (b, 3, H, W)."""
        return ImagesOnDisk(self.stores, self.rows[index.cpu().numpy()]).to("cpu")

    @property
    def shape(self) -> torch.Size:
        """(n, 3, H, W)."""
        _, height, width, channels = self.stores[0].shape
        return torch.Size((len(self), channels, height, width))

    @property
    def nbytes(self) -> int:
        """The size of all n images in memory."""
        return self.shape.numel()

    def split(self, size: int) -> list["ImagesOnDisk"]:
        """Return the images in groups of `size`, the last of which may be smaller; nothing is read."""
        return [ImagesOnDisk(self.stores, self.rows[at : at + size]) for at in range(0, max(1, len(self)), size)]

    def to(self, device: str | torch.device) -> Tensor:
        """Read all images into a tensor uint8 (n, 3, H, W) on a device, block by block."""
        images = torch.empty(self.shape, dtype=torch.uint8, device=device)
        step = max(1, _BLOCK // self.shape[1:].numel())
        for at in range(0, len(self), step):
            images[at : at + step] = torch.from_numpy(self._read(self.rows[at : at + step])).permute(0, 3, 1, 2)
        return images

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Return the images at `rows`, uint8 (b, H, W, 3)."""
        first, *others = self.stores
        if not others:
            return _taken(first, rows)
        images = np.empty((len(rows), *first.shape[1:]), np.uint8)
        start = 0
        for store in self.stores:
            own = (rows >= start) & (rows < start + len(store))
            images[own] = _taken(store, rows[own] - start)
            start += len(store)
        return images


ImageRows = Tensor | ImagesOnDisk
"""uint8 (n, 3, H, W), in memory or on disk."""


def in_parts(images: ImageRows, size: int) -> Iterator[Tensor]:
    """Yield all images, at most `size` at a time; from disk, the next ones are read meanwhile."""
    if isinstance(images, Tensor):
        yield from images.split(size)
    else:
        yield from threads.ahead(lambda part: part.to("cpu"), images.split(size))


def _taken(store: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return a copy of the images at `rows`, and take the pages that were read out of this process."""
    images = store[rows]
    if isinstance(store, np.memmap) and isinstance(store.base, mmap.mmap) and len(rows):
        start, size = store.offset % mmap.ALLOCATIONGRANULARITY, store[0].nbytes
        first, last = int(rows.min()), int(rows.max())
        spans = [(first, last)] if (last - first) * size < _FEW else [(row, row) for row in rows.tolist()]
        for first, last in spans:
            _release(store.base, start + first * size, start + (last + 1) * size)
    return images


def _release(pages: mmap.mmap, start: int, stop: int) -> None:
    """Take the pages from byte `start` to `stop` out of this process, with those that were mapped around them."""
    start = max(0, start - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
    pages.madvise(mmap.MADV_DONTNEED, start, min(stop + _AROUND, len(pages)) - start)
