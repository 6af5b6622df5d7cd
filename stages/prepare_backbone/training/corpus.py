"""The images to train on, in memory: class folders of image files."""

import functools
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import memory
from pipeline.data import class_names, image_folder, image_hashes
from pipeline.data.datasets import check_names
from pipeline.data.file_names import some
from pipeline.data.images import Skipped, refuse_broken
from pipeline.errors import DataError, PipelineError

log = logging.getLogger(__name__)

_SETTING = "prepare_backbone.corpus"
_SHARE_OF_MEMORY = 0.6  # that the images may fill


@dataclass(frozen=True)
class Corpus:
    """Images to train on: uint8 (N, S, S, 3), their classes int64 (N,), and the name of each class.

    `files` are the hashes of their files, uint64 (N,); empty for images that come from no files.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: list[str]
    files: np.ndarray

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of pixels, files, classes and names."""
        digest = hashlib.sha256("\n".join(self.class_names).encode())
        for values in (self.labels.astype("<i8"), self.files.astype("<u8"), self.images):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def hashes(self) -> dict[str, list[str]]:
        """Return the sorted hashes of the images' files and of their pixels."""
        found = {"files": self.files, "pixels": image_hashes.of_pixels(self.images)}
        return {kind: image_hashes.as_text(np.sort(values)) for kind, values in found.items()}

    def images_per_class(self) -> dict[str, int]:
        """Return the number of images by class name."""
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))


def read(root: Path, image_size: int, listing: Path) -> Corpus:
    """Read all images of the class folders in `root`, cropped to their centre square and resized to this size.

    Raises:
        DataError: The folder is missing or has no images, has fewer than two classes, or two of one name; or images
            cannot be read: all of them are then listed in the file `listing`.
        PipelineError: The images do not fit into memory.
    """
    names, listed = image_folder.read(root, image_size, _SETTING)
    check_names(names, "class")
    _check_classes(root, names, np.bincount(listed.labels, minlength=len(names)))
    _check_memory(len(listed), image_size)
    images = np.empty((len(listed), image_size, image_size, 3), np.uint8)
    files = np.empty(len(listed), np.uint64)
    skipped: list[Skipped] = []
    for block in listed.blocks():
        images[block.rows] = block.images
        assert block.files is not None  # all images are files
        files[block.rows] = block.files
        skipped += block.skipped
    if skipped:
        raise refuse_broken(root, skipped, listing, "Repair or remove them")
    listing.unlink(missing_ok=True)  # of an earlier run
    return Corpus(images, listed.labels, names, files)


def _check_classes(root: Path, names: list[str], counts: np.ndarray) -> None:
    filled = [name for name, count in zip(names, counts, strict=True) if count]
    if len(filled) < 2:
        raise DataError(
            f"{root} has images of one class only ({some(filled)}), but a guide tells classes apart. Add folders of "
            f"other classes, or set {_SETTING} to the folder that holds the class folders."
        )
    if len(filled) < len(names):
        log.warning("%s: classes without images: %s", root, some(set(names) - set(filled)))
    if odd := class_names.without_words(names):
        log.warning(
            "%s: class names that are numbers or ids: %s. Captions are most useful in the words of your prompts", root,
            some(odd),
        )  # fmt: skip


def _check_memory(count: int, image_size: int) -> None:
    needed, free = count * 3 * image_size**2, memory.available()
    if needed > _SHARE_OF_MEMORY * free:
        raise PipelineError(
            f"{count} images of {image_size} pixels need {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are "
            "free. Lower prepare_backbone.training.image_size, or use fewer images."
        )
