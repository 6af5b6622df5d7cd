"""For scale.py and plan.py: random images; and an epoch of training from images that stay on disk.

Seconds grow as the number of images does, and the peak of memory above that at the start does not: it is that of some
batches. (The file's pages count, too, while a batch is copied: up to two megabytes for an image, as the system keeps a
file in pages of that size.)
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.data import datasets
from pipeline.data.datasets import PreparedDataset, Source
from pipeline.data.images import Block, images_per_block
from stages.train_fl import methods, models
from stages.train_fl.client_data import ClientData
from stages.train_fl.encoders import EncoderSettings
from stages.train_fl.engines import local
from stages.train_fl.images import ImagesOnDisk
from stages.train_fl.rounds import Schedule, begin
from stages.train_fl.session import weights_of

IMAGE_SIZE, CLASSES, BATCH = 64, 10, 32


class Noise:
    """A split of random images, made block by block."""

    def __init__(self, count: int, image_size: int = IMAGE_SIZE, classes: int = CLASSES) -> None:
        """Make so many images, of the classes in turn."""
        self.labels, self.domains = np.arange(count) % classes, np.zeros(count, np.int64)
        self.image_size, self._classes = image_size, classes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def take(self, index: np.ndarray) -> "Noise":
        """Return as many images."""
        return Noise(len(index), self.image_size, self._classes)

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Yield the images from row `start` on."""
        size, rng = self.image_size, np.random.default_rng(start)
        step = images_per_block(size)
        for first in range(start, len(self), step):
            rows = np.arange(first, min(first + step, len(self)))
            yield Block(rows, rng.integers(0, 256, (len(rows), size, size, 3), np.uint8), [])

    def identity(self) -> None:
        """Return None: the images are made fast."""


def write_images(folder: Path, images: int) -> None:
    """Write a data set with so many training images."""
    splits = {"train": Noise(images), "test": Noise(1)}
    datasets.write(folder / "data", "noise", "noise", Source([str(label) for label in range(CLASSES)], splits, "none"))


def train_from_map(folder: Path, images: int) -> Callable[[], object]:
    """Train a client that has all images for an epoch, from the memory map."""
    torch.set_num_threads(1)
    train = PreparedDataset(folder / "data").load("train")
    data = ClientData(ImagesOnDisk((train.images,), np.arange(len(train))), torch.from_numpy(train.labels))
    model = models.build(EncoderSettings("small_cnn", "batch", "float32", True), CLASSES, seed=0)
    method = methods.build(methods.FedAvg.Settings(), model, 0.9, 0.0, 1)
    schedule = Schedule(1, 1, 1, BATCH, 0.01, 1.0, "crop-flip", 0)
    start = begin(method, weights_of(model))
    return lambda: list(local.run(method, start, [data], schedule, "cpu"))
