"""Images with their labels and domains, in memory or read block by block, and stratified splits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline import seeding
from pipeline.errors import DataError
from pipeline.io.atomic import write_text

_TEST_FRACTION = 0.2
_NAMED = 5  # broken images in an error
BLOCK_BYTES = 16 * 2**20
"""Images are read, hashed and written in blocks of about this size."""


@dataclass(frozen=True)
class Skipped:
    """An image that was left out: its path relative to the source's root, and why it could not be read."""

    path: str
    reason: str


class Origin(BaseModel):
    """Where images came from: a data set of the hub and its commit, if it is one, and the files of each split."""

    model_config = ConfigDict(strict=True, extra="forbid")

    repository: str | None
    revision: str | None
    files: dict[Literal["train", "test"], list[str]]


class Block(NamedTuple):
    """Consecutive images of a split: rows int64 (b,), positions in the split; images uint8 (b, H, W, 3).

    `files` are the hashes of their files, uint64 (b,); None for images that come from no files.
    """

    rows: np.ndarray
    images: np.ndarray
    skipped: list[Skipped]
    files: np.ndarray | None = None


class Split(Protocol):
    """One split of a source, in memory as `Images` or read lazily."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,), counted from 0."""

    @property
    def domains(self) -> np.ndarray:
        """int64 (N,), counted from 0."""

    @property
    def image_size(self) -> int:
        """Height and width of every image, pixels."""

    def __len__(self) -> int:
        """Number of images."""

    def take(self, index: np.ndarray) -> Self:
        """Return the images at these positions, in this order."""

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Yield the images from row `start` on, in order; skipped rows are not in any block's `rows`."""

    def identity(self) -> str | None:
        """Return a text that changes if the images or their order do; None if they are read fast."""


@dataclass(frozen=True)
class Images:
    """Images of one split: images uint8 (N, H, W, 3) in 0..255; labels and domains int64 (N,), counted from 0.

    `images` is an array or a read-only memory map; indexing it by an array of positions gives an array.
    """

    images: np.ndarray
    labels: np.ndarray
    domains: np.ndarray

    @classmethod
    def of_one_domain(cls, images: np.ndarray, labels: np.ndarray) -> "Images":
        """Make images that all come from domain 0."""
        return cls(images, labels, np.zeros(len(labels), np.int64))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def image_size(self) -> int:
        """Height and width, pixels."""
        return int(self.images.shape[1])

    def take(self, index: np.ndarray) -> "Images":
        """Return the images at these positions, in this order, in memory."""
        return Images(self.images[index], self.labels[index], self.domains[index])

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Yield the images from row `start` on, in blocks of about `BLOCK_BYTES`."""
        step = images_per_block(self.image_size)
        for first in range(start, len(self), step):
            rows = np.arange(first, min(first + step, len(self)))
            yield Block(rows, self.images[first : first + step], [])

    def identity(self) -> None:
        """Return None: images in memory are read fast."""


@dataclass(frozen=True)
class Source:
    """A data set as its source gives it, before it is written."""

    class_names: list[str]
    splits: Mapping[str, Split]
    licence: str
    domain_names: list[str] | None = None  # None: one domain, named as the data set
    origin: Origin | None = None  # of a data set in large files


def refuse_broken(root: Path | str, images: list[Skipped], listing: Path, advice: str) -> DataError:
    """Write the list of a source's broken images to a file, and return the error that names the first of them."""
    listing.parent.mkdir(parents=True, exist_ok=True)
    write_text(listing, "".join(f"{image.path}\t{image.reason}\n" for image in images))
    named = ", ".join(f"{image.path} ({image.reason})" for image in images[:_NAMED])
    more = f" and {len(images) - _NAMED} more, all listed in {listing}" if len(images) > _NAMED else ""
    number = f"{len(images)} images" if len(images) > 1 else "an image"
    return DataError(f"{root}: {number} cannot be read: {named}{more}. {advice}.")


def images_per_block(image_size: int) -> int:
    """Return how many RGB images of this height and width fill about `BLOCK_BYTES`; at least one."""
    return max(1, BLOCK_BYTES // (3 * image_size**2))


def stratified_split(labels: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` samples, 0 <= count <= N, with each class of `labels`, int64 (N,), in proportion.

    Classes get floor(count * share) samples; the remaining ones go to the classes with the largest remainders
    (Hamilton's method), ties to the smaller label.

    Returns:
        Positions of the samples and of the rest: ascending int64 arrays, (count,) and (N - count,).
    """
    classes, sizes = np.unique(labels, return_counts=True)
    take, remainder = np.divmod(sizes * count, len(labels))
    for position in np.argsort(-remainder, kind="stable")[: count - take.sum()]:
        take[position] += 1
    shares = zip(classes, take, strict=True)
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:number] for label, number in shares]
    chosen = np.sort(np.concatenate(drawn))
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


def draw_test(labels: np.ndarray, seed: int, *stream: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw the test split of images that have none: one in five, stratified by `labels`, int64 (N,).

    `stream` distinguishes draws of one seed. Returns the positions of the training and of the test images, ascending.
    """
    rows = max(1, round(_TEST_FRACTION * len(labels)))
    in_test, in_train = stratified_split(labels, rows, seeding.numpy_generator(seed, "train/test split", *stream))
    return in_train, in_test
