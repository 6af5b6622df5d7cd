"""The sources of images: name -> function of the data set's folder and the stage's parameters.

A function lists images, labels and class names; the selected image files are read later, while the prepared data set is
written. To add a source, add its function here and its name to `pipeline.settings.params.ImageSource`.
"""

from collections.abc import Callable
from pathlib import Path

from pipeline.data.images import Source
from pipeline.hub import address
from pipeline.settings.config import Config
from pipeline.settings.params import PrepareData
from stages.prepare_data import arrays, hf_datasets, listed, tables, tars, trees
from stages.prepare_data.tiny_imagenet import tiny_imagenet

SOURCES: dict[str, Callable[[Path, PrepareData], Source]] = {
    "digits": arrays.digits,
    "mnist": arrays.mnist,
    "usps": arrays.usps,
    "svhn": arrays.svhn,
    "cifar10": arrays.cifar10,
    "cifar100": arrays.cifar100,
    "flowers102": listed.flowers102,
    "fgvc-aircraft": listed.fgvc_aircraft,
    "stanford-cars": listed.stanford_cars,
    "tiny-imagenet": tiny_imagenet,
    "digits-five": trees.digits_five,
    "folder": trees.folder,
    "domain-folder": trees.domain_folder,
    "webdataset": tars.webdataset,
    "parquet": tables.parquet,
    "hf-dataset": hf_datasets.hf_dataset,
}

WITH_COLUMNS = ("webdataset", "parquet", "hf-dataset")
"""The sources that `image_column` and `label_column` are for."""


def read(config: Config) -> Source:
    """List the source that params.yaml names; see its function for errors."""
    params = config.params.prepare_data
    root = config.path(params.path or f"data/raw/{params.source}")
    on_hub = params.source == "hf-dataset" and params.path and not root.exists() and not address.is_path(params.path)
    if on_hub and params.path:
        return hf_datasets.on_hub(params.path, config.state_dir / "hub", params)
    return SOURCES[params.source](root, params)
