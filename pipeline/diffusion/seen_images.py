"""Count the images of a data set that a backbone was trained on, by their hashes (`pipeline.data.image_hashes`)."""

import numpy as np

from pipeline.data import image_hashes
from pipeline.data.datasets import SPLITS, PreparedDataset
from pipeline.diffusion.frozen_model import TrainingRecord


def count(dataset: PreparedDataset, training: TrainingRecord) -> int:
    """Return how many images of both splits have a file or pixels in common with an image of the backbone's corpus.

    Raise DataError if the data set is damaged.
    """
    files, pixels = (image_hashes.from_text(training.hashes.get(kind, [])) for kind in ("files", "pixels"))
    seen = 0
    for split in SPLITS:
        images = dataset.load(split)
        hashes = [image_hashes.of_pixels(block.images) for block in images.blocks()]
        known = np.isin(np.concatenate(hashes), pixels)
        if (of_files := dataset.file_hashes(split)) is not None:
            known |= np.isin(of_files, files)
        seen += int(known.sum())
    return seen
