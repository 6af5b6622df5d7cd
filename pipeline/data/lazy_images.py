"""Images that are read only while they are written: by several threads, in order, in bounded memory.

Pillow releases Python's global lock while it decodes and resizes, so threads use all cores.
"""

import os
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from pipeline.data.decode import BrokenImageError, read_hashed, resize
from pipeline.data.images import Block, Skipped, images_per_block
from pipeline.progress import progress_bar

_MAX_IMAGES_PER_TASK = 64


@dataclass(frozen=True)
class ImageFiles:
    """Image files under a root; `paths` are relative to it."""

    root: Path
    paths: list[str]
    image_size: int
    rows_cut: int = 0  # rows of pixels to remove at the bottom of every image

    def read(self, position: int) -> tuple[np.ndarray, int]:
        """Return an image, uint8 (H, W, 3), and its file's hash, or raise BrokenImageError."""
        return read_hashed(self.root / self.paths[position], self.image_size, self.rows_cut)

    def name(self, position: int) -> str:
        """Return the path relative to the root, in NFC; bytes that are not UTF-8 are escaped."""
        return unicodedata.normalize("NFC", os.fsencode(self.paths[position]).decode("utf-8", "backslashreplace"))


@dataclass(frozen=True)
class ImageArrays:
    """Images in memory, uint8, grey (N, H, W) or RGB (N, H, W, 3)."""

    images: np.ndarray
    image_size: int

    def read(self, position: int) -> tuple[np.ndarray, None]:
        """Return an image, uint8 (H, W, 3), which has no file."""
        image = np.asarray(resize(Image.fromarray(self.images[position]), self.image_size))
        return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image, None

    def name(self, position: int) -> str:
        """Return the image's position, for messages."""
        return f"image {position}"


@dataclass(frozen=True)
class LazyImages:
    """A split whose images `reader` reads by `positions`, int64 (N,); labels and domains are int64 (N,)."""

    reader: ImageFiles | ImageArrays
    positions: np.ndarray
    labels: np.ndarray
    domains: np.ndarray

    @classmethod
    def of(cls, reader: ImageFiles | ImageArrays, labels: np.ndarray, domains: np.ndarray | None = None) -> Self:
        """Make a split of all images of a reader, by default of one domain."""
        labels = np.asarray(labels, np.int64)
        domains = np.zeros_like(labels) if domains is None else np.asarray(domains, np.int64)
        return cls(reader, np.arange(len(labels)), labels, domains)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.positions)

    @property
    def image_size(self) -> int:
        """Height and width, pixels."""
        return self.reader.image_size

    def take(self, index: np.ndarray) -> Self:
        """Return the images at these positions, in this order, without reading them."""
        return replace(self, positions=self.positions[index], labels=self.labels[index], domains=self.domains[index])

    def blocks(self) -> Iterator[Block]:
        """Yield all images in order, with broken ones in `skipped`; raise SystemRefusal if the system refuses one."""
        step = min(_MAX_IMAGES_PER_TASK, images_per_block(self.image_size))
        ranges = [range(start, min(start + step, len(self))) for start in range(0, len(self), step)]
        with progress_bar(len(self), "read images", "image") as bar:
            for rows, block in zip(ranges, _in_order(self._read_block, ranges), strict=True):
                yield block
                bar.update(len(rows))

    def _read_block(self, rows: range) -> Block:
        images, files, read, skipped = [], [], [], []
        for row in rows:
            position = int(self.positions[row])
            try:
                image, file = self.reader.read(position)
                images.append(image)
                files.append(file)
                read.append(row)
            except BrokenImageError as error:
                skipped.append(Skipped(self.reader.name(position), str(error)))
        pixels = np.stack(images) if images else np.empty((0, self.image_size, self.image_size, 3), np.uint8)
        hashes = np.array(files, np.uint64) if isinstance(self.reader, ImageFiles) else None
        return Block(np.array(read, np.int64), pixels, skipped, hashes)


def _in_order(work: Callable[[range], Block], items: Iterable[range]) -> Iterator[Block]:
    """Yield work(item) for every item in order, computed by one thread per core, a few items ahead."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    under_way: deque[Future[Block]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
