"""Data sets of image files that lists of the release label: Flowers-102, FGVC-Aircraft, Stanford Cars, by torchvision.

The release's lists number the classes and name them in the order of the numbers; no folder name or sorting comes
between a label and its name.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.images import Source
from pipeline.settings.params import PrepareData
from stages.prepare_data.arrays import reader
from stages.prepare_data.lazy_images import ImageFiles, LazyImages

_AIRCRAFT_BANNER_ROWS = 20  # a copyright notice, which the release asks to remove


def flowers102(root: Path, params: PrepareData) -> Source:
    """Oxford Flowers-102: train is the release's train and validation images (2,040), test its test images (6,149).

    Raises:
        DataError: It is not in `root` and cannot be downloaded, or it is damaged.
    """
    from torchvision.datasets import Flowers102

    where = root / "flowers-102"
    read = reader("Flowers-102", root, f"102flowers.tgz (unpacked: jpg/), imagelabels.mat and setid.mat in {where}")
    halves = {split: read(Flowers102, split=split, download=True) for split in ("train", "val", "test")}
    files = {split: (half._image_files, half._labels) for split, half in halves.items()}
    train_files, train_labels = (list(files["train"][part]) + list(files["val"][part]) for part in (0, 1))
    splits = {"train": _split(root, train_files, train_labels, params), "test": _split(root, *files["test"], params)}
    names = [name.rstrip("?") for name in halves["train"].classes]
    return Source(names, splits, "unknown: published for research")


def fgvc_aircraft(root: Path, params: PrepareData) -> Source:
    """FGVC-Aircraft's 100 variants: train is the release's train and validation images (6,667), test 3,333.

    "737-700" alone is no word that a text encoder knows to be a plane: the class name is "737-700 aircraft".

    Raises:
        DataError: See `flowers102`.
    """
    from torchvision.datasets import FGVCAircraft

    read = reader("FGVC-Aircraft", root, f"fgvc-aircraft-2013b.tar.gz in {root}")
    halves = {
        "train": read(FGVCAircraft, split="trainval", download=True),
        "test": read(FGVCAircraft, split="test", download=True),
    }
    splits = {
        split: _split(root, half._image_files, half._labels, params, _AIRCRAFT_BANNER_ROWS)
        for split, half in halves.items()
    }
    names = [f"{variant} aircraft" for variant in halves["train"].classes]
    return Source(names, splits, "non-commercial research only")


def stanford_cars(root: Path, params: PrepareData) -> Source:
    """Stanford Cars: 196 models, 8,144 train and 8,041 test images. Its home is gone: it cannot be downloaded.

    Raises:
        DataError: It is not in `root`, or it is damaged.
    """
    from torchvision.datasets import StanfordCars

    parts = "cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat"
    read = reader("Stanford Cars", root, f"{parts} in {root / 'stanford_cars'}")
    halves = {split: read(StanfordCars, split=split) for split in ("train", "test")}
    splits = {
        split: _split(root, [file for file, _ in half._samples], [label for _, label in half._samples], params)
        for split, half in halves.items()
    }
    return Source(list(halves["train"].classes), splits, "non-commercial research only")


def _split(
    root: Path, files: Sequence[str | Path], labels: Sequence[int], params: PrepareData, rows_cut: int = 0
) -> LazyImages:
    paths = [str(Path(file).relative_to(root)) for file in files]
    reading = ImageFiles(root, paths, params.image_size, rows_cut)
    return LazyImages.of(reading, np.asarray(labels, np.int64))
