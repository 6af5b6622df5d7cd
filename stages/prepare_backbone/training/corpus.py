"""The images to train on, in memory: class folders of image files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data import image_folder
from pipeline.errors import DataError, PipelineError


@dataclass(frozen=True)
class Corpus:
    """Images to train on: uint8 (N, S, S, 3), their classes int64 (N,), and the name of each class."""

    images: np.ndarray
    labels: np.ndarray
    class_names: list[str]


def read(root: Path, image_size: int) -> Corpus:
    """Read all images of the class folders in `root`, cropped to their centre square and resized to this size.

    Raises:
        DataError: The folder is missing or has no images, or images cannot be read.
        PipelineError: The images do not fit into memory.
    """
    names, listed = image_folder.read(root, image_size, "prepare_backbone.corpus")
    try:
        images = np.empty((len(listed), image_size, image_size, 3), np.uint8)
    except MemoryError:
        raise PipelineError("x") from None
    skipped = []
    for block in listed.blocks():
        images[block.rows] = block.images
        skipped += block.skipped
    if skipped:
        raise DataError(f"{root}: images cannot be read: {skipped[0].path} ({skipped[0].reason})")
    return Corpus(images, listed.labels, names)
