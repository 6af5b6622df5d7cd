"""Runs the stage: reads the source, subsets it if asked, writes the prepared data set."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline import datasets, seeding
from pipeline.config import Config
from pipeline.datasets import Source
from pipeline.errors import PipelineError
from stages.prepare_data import sources

log = logging.getLogger(__name__)


def run(config: Config) -> Path:
    """Prepares the data set that params.yaml names.

    Returns:
        Its folder.

    Raises:
        PipelineError: the source is missing, holds a broken image, or is smaller than the subset asked for.
    """
    params = config.params.prepare_data
    if params.source == "digits":
        source = sources.digits(params.image_size)
    elif params.source == "cifar10":
        root = config.root / (params.path or "data/raw/cifar10")
        source = sources.cifar10(root, params.image_size)
    else:
        if params.path is None:
            raise PipelineError("prepare_data.source is folder: set prepare_data.path to the folder of images")
        rng = seeding.numpy_generator(params.seed, "train/test split")
        source = sources.image_folder(config.root / params.path, params.image_size, rng)
    if params.train_subset is not None:
        source = _subset(source, params.train_subset, seeding.numpy_generator(params.seed, "train subset"))
    path = datasets.write(config.dataset_dir, params.name, params.source, source)
    counts = ", ".join(f"{len(images)} {split}" for split, images in source.splits.items())
    log.info("%s: %s images of %d classes", path, counts, len(source.class_names))
    return path


def _subset(source: Source, count: int, rng: np.random.Generator) -> Source:
    train = source.splits["train"]
    if count > len(train):
        raise PipelineError(f"prepare_data.train_subset = {count}: the training split has {len(train)} images")
    chosen, _ = datasets.stratified_split(train.labels, count, rng)
    return replace(source, splits={**source.splits, "train": train.take(chosen)})
