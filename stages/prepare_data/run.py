"""Run the stage: list the source, subset it if configured, and write the prepared data set."""

import logging
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline import seeding
from pipeline.data import datasets
from pipeline.data.datasets import BrokenImages, PreparedDataset
from pipeline.data.images import Source, refuse_broken, stratified_split
from pipeline.errors import ConfigError
from pipeline.settings.config import Config
from stages.prepare_data import remarks, sources

log = logging.getLogger(__name__)


def run(config: Config) -> Path:
    """Prepare the data set that params.yaml names, and return its folder.

    Raises:
        DataError: The source is missing, or has broken images that may not be skipped.
        ConfigError: The subset is larger than the training split.
    """
    params = config.params.prepare_data
    root = config.path(params.path or f"data/raw/{params.source}")
    if (params.image_column or params.label_column) and params.source not in sources.WITH_COLUMNS:
        log.warning("prepare_data.image_column and label_column are not used by the source %s", params.source)
    source = sources.read(config)
    if params.train_subset is not None:
        source = _subset(source, params.train_subset, seeding.numpy_generator(params.seed, "train subset"))
    listing = config.state_dir / f"broken-images-{params.name}.txt"
    before = remarks.hash_of(config.dataset_dir)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # a damaged image is decoded or named in the error
            skip = params.broken_images == "skip"
            path = datasets.write(config.dataset_dir, params.name, params.source, source, skip)
    except BrokenImages as error:
        advice = "Repair or remove them, or set prepare_data.broken_images: skip"
        where = f"{source.origin.repository}" if source.origin and source.origin.repository else str(root)
        raise refuse_broken(where, error.images, listing, advice) from None
    listing.unlink(missing_ok=True)  # of an earlier run
    dataset = PreparedDataset(path)
    remarks.log_outcome(dataset)
    if before not in (None, dataset.hash):
        remarks.log_sets_of_the_replaced(before, config.features_dir.parent)
    return path


def _subset(source: Source, count: int, rng: np.random.Generator) -> Source:
    """Keep `count` training images, with each class of each domain in proportion."""
    train = source.splits["train"]
    if count > len(train):
        raise ConfigError(f"prepare_data.train_subset = {count}: the training split has only {len(train)} images.")
    chosen, _ = stratified_split(train.domains * len(source.class_names) + train.labels, count, rng)
    return replace(source, splits={**source.splits, "train": train.take(chosen)})
