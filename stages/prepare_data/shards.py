"""A data set in large files (tars, Parquet, Arrow): its labels are listed first, its images streamed when written."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.decode import BrokenImageError, decode_hashed
from pipeline.data.images import Origin, Source, draw_test
from pipeline.data.lazy_images import LazyImages, Reader, state_of
from pipeline.errors import DataError
from pipeline.progress import track
from pipeline.text import first_few
from stages.prepare_data.labels import Labels, resolve

log = logging.getLogger(__name__)

_TERMS = "unknown: see the data set's own terms"


@dataclass(frozen=True)
class Shards:
    """The files of a data set: names relative to `root`, with "/", by split; under "all" if the test split is drawn.

    `fetch` brings files from the hub; `repository` and `revision` are their address there.
    """

    title: str
    root: Path
    splits: Mapping[str, list[str]]
    repository: str | None = None
    revision: str | None = None
    fetch: Callable[[Sequence[str]], object] = lambda names: None


@dataclass(frozen=True)
class Listing:
    """The images of one split, their labels, and what the files say of class names: texts by number, or a full list."""

    images: Reader[Any]
    labels: Labels
    texts: Mapping[int, str]
    class_names: list[str] | None = None


class EncodedImages:
    """Base of the readers of large files; an item is an image file's bytes, or the reason why there are none."""

    def __init__(self, root: Path, files: Sequence[str], image_size: int) -> None:
        """Read from files, named relative to `root`."""
        self.root, self.files, self.image_size = root, files, image_size

    def read(self, item: bytes | str) -> tuple[np.ndarray, int]:
        """Decode an image; see `Reader.read`."""
        if isinstance(item, str):
            raise BrokenImageError(item)
        return decode_hashed(item, self.root, self.image_size)

    def identity(self) -> str:
        """Return the names of the files, and each one's size and time of change."""
        return "\n".join([str(self.root), *(f"{file} {state_of(self.root / file)!r}" for file in self.files)])


def read(
    shards: Shards, listed: Callable[[str, Sequence[str]], Listing], class_names: list[str] | None, seed: int
) -> Source:
    """List the images of a data set, by `listed` for each split, and return them with their class names.

    Validation files become the test split if it is missing, or if none of the test images has a label, as in
    competitions; else they are left out, and not listed. Without either, the test split is drawn by the seed.

    Raises:
        DataError: A split has no images, a label is missing or beyond the names, the splits' class names differ, or a
            file is damaged.
    """
    train = "train" if "train" in shards.splits else "all"
    test = next((split for split in ("test", "validation") if split in shards.splits), None)
    found = {train: _listing(shards, train, listed)}
    if test is not None:
        found[test] = _listing(shards, test, listed)
        if test == "test" and found[test].labels.missing == len(found[test].labels) and "validation" in shards.splits:
            log.info("%s: the test images have no labels, so the validation files are the test split", shards.title)
            del found[test]
            test = "validation"
            found[test] = _listing(shards, test, listed)
    described = {split: one.class_names for split, one in found.items() if one.class_names}
    if len(described) == 2 and described[train] != described[str(test)]:
        problem = f"{shards.title}: the {test} files have other class names than the {train} files"
        raise DataError(f"{problem}. Write both with the same ClassLabel.")
    known = class_names or next(iter(described.values()), None)
    texts = {number: text for one in found.values() for number, text in one.texts.items()}
    names, labels = resolve(shards.title, {split: one.labels for split, one in found.items()}, known, texts)
    images = {split: LazyImages.of(one.images, labels[split]) for split, one in found.items()}
    origin = Origin(
        repository=shards.repository,
        revision=shards.revision,
        files={"train": shards.splits[train], "test": shards.splits[test or train]},
    )
    if test is None:
        log.info("%s: no test files; one image in five, stratified by class, is the test split", shards.title)
        in_train, in_test = draw_test(labels[train], seed)
        splits = {"train": images[train].take(in_train), "test": images[train].take(in_test)}
    else:
        left_out = "; the validation files are left out" if test == "test" and "validation" in shards.splits else ""
        log.info("%s: the %s files are the test split%s", shards.title, test, left_out)
        splits = {"train": images[train], "test": images[test]}
    return Source(names, splits, _TERMS, origin=origin)


def _listing(shards: Shards, split: str, listed: Callable[[str, Sequence[str]], Listing]) -> Listing:
    files = shards.splits[split]
    shards.fetch(files)
    listing = listed(split, files)
    if not len(listing.labels):
        which = "files" if split == "all" else f"{split} files"
        raise DataError(f"{shards.title}: the {which} ({first_few(files, 1)}) have no images. Add some.")
    return listing


def tracked(files: Sequence[str]) -> Any:
    """Yield each file's number and name, with progress."""
    return track(enumerate(files), "list images", len(files), "file")
