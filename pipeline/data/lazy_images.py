"""Images that are read only while they are written: by several threads, in order, in bounded memory.

Pillow releases Python's global lock while it decodes and resizes, so threads use all cores.
"""

import contextlib
import functools
import hashlib
import os
import unicodedata
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from PIL import Image

from pipeline.data.decode import BrokenImageError, read_hashed, resize
from pipeline.data.images import Block, Skipped, images_per_block
from pipeline.progress import progress_bar

_MAX_IMAGES_PER_TASK = 64
_BYTES_PER_TASK = 4 * 2**20  # of encoded images that wait in memory

Item = TypeVar("Item")


class Reader(Protocol[Item]):
    """The images of a source, by position.

    `items` runs in one thread, because some formats can only be read in order; several threads then `read`.
    """

    @property
    def image_size(self) -> int:
        """Height and width of every image, pixels."""

    def items(self, positions: np.ndarray) -> Generator[Item]:
        """Yield what `read` needs for each of these positions, int64, ascending: a path, an offset, or the file."""

    def read(self, item: Item) -> tuple[np.ndarray, int | None]:
        """Return an image, uint8 (H, W, 3), and its file's hash (see `image_hashes`), or raise BrokenImageError."""

    def name(self, position: int) -> str:
        """Return the image's name for messages and manifests, which does not depend on the root."""

    def identity(self) -> str | None:
        """Return a text that changes if the images do; None if they are read too fast for this to be of use."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files under a root; `paths` are relative to it."""

    root: Path
    paths: list[str]
    image_size: int
    rows_cut: int = 0  # rows of pixels to remove at the bottom of every image

    def items(self, positions: np.ndarray) -> Generator[str]:
        """Yield the paths."""
        yield from (self.paths[position] for position in positions)

    def read(self, item: str) -> tuple[np.ndarray, int]:
        """Return an image, uint8 (H, W, 3), and its file's hash, or raise BrokenImageError."""
        return read_hashed(self.root / item, self.image_size, self.rows_cut)

    def name(self, position: int) -> str:
        """Return the path relative to the root, in NFC; bytes that are not UTF-8 are escaped."""
        return unicodedata.normalize("NFC", os.fsencode(self.paths[position]).decode("utf-8", "backslashreplace"))

    def identity(self) -> str:
        """Return a hash of the paths, and of each file's size and time of change when it is first asked for."""
        return self._identity

    @functools.cached_property
    def _identity(self) -> str:  # cached for splits that are drawn from the same images
        digest = hashlib.sha256(os.fsencode(self.root) + b" %d" % self.rows_cut)
        for path in self.paths:
            digest.update(b"\0" + os.fsencode(path) + state_of(self.root / path))
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageArrays:
    """Images in memory, uint8, grey (N, H, W) or RGB (N, H, W, 3)."""

    images: np.ndarray
    image_size: int

    def items(self, positions: np.ndarray) -> Generator[np.ndarray]:
        """Yield the images."""
        yield from (self.images[position] for position in positions)

    def read(self, item: np.ndarray) -> tuple[np.ndarray, None]:
        """Return an image, uint8 (H, W, 3), which has no file."""
        image = np.asarray(resize(Image.fromarray(item), self.image_size))
        return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image, None

    def name(self, position: int) -> str:
        """Return the image's position, for messages."""
        return f"image {position}"

    def identity(self) -> None:
        """Return None: images in memory are read fast."""


@dataclass(frozen=True)
class LazyImages:
    """A split whose images `reader` reads by `positions`, int64 (N,); labels and domains are int64 (N,)."""

    reader: Reader[Any]
    positions: np.ndarray
    labels: np.ndarray
    domains: np.ndarray

    @classmethod
    def of(cls, reader: Reader[Any], labels: np.ndarray, domains: np.ndarray | None = None) -> Self:
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

    def identity(self) -> str | None:
        """Return a text that changes if the images or their order do; None if the reader has none."""
        images = self.reader.identity()
        return images and f"{images}-{hashlib.sha256(np.ascontiguousarray(self.positions).data).hexdigest()}"

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Yield the images from row `start` on, in order, with broken ones in `skipped`.

        Raise SystemRefusal if the system refuses to read one.
        """
        with progress_bar(len(self) - start, "read images", "image") as bar:
            for block in _in_order(self._read_block, self._tasks(start)):
                yield block
                bar.update(len(block.rows) + len(block.skipped))

    def _tasks(self, start: int) -> Iterator[tuple[int, list[Any]]]:
        """Yield the first row and the items of each task: some images, and fewer if their files are large."""
        most = min(_MAX_IMAGES_PER_TASK, images_per_block(self.image_size))
        items: list[Any] = []
        size, first = 0, start
        with contextlib.closing(self.reader.items(self.positions[start:])) as every:
            for item in every:
                items.append(item)
                size += len(item) if isinstance(item, bytes) else 0
                if len(items) == most or size >= _BYTES_PER_TASK:
                    yield first, items
                    first += len(items)
                    items, size = [], 0
        if items:
            yield first, items

    def _read_block(self, task: tuple[int, list[Any]]) -> Block:
        images, files, read, skipped = [], [], [], []
        for row, item in enumerate(task[1], task[0]):
            try:
                image, file = self.reader.read(item)
                images.append(image)
                files.append(file)
                read.append(row)
            except BrokenImageError as error:
                skipped.append(Skipped(self.reader.name(int(self.positions[row])), str(error)))
        pixels = np.stack(images) if images else np.empty((0, self.image_size, self.image_size, 3), np.uint8)
        hashes = None if None in files else np.array(files, np.uint64)
        return Block(np.array(read, np.int64), pixels, skipped, hashes)


def state_of(path: Path) -> bytes:
    """Return a file's size and time of change, to notice that it is another one now."""
    try:
        status = os.stat(path)
    except OSError:
        return b"0 0"
    return b"%d %d" % (status.st_size, status.st_mtime_ns)


def _in_order(work: Callable[[Item], Block], items: Iterable[Item]) -> Iterator[Block]:
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
