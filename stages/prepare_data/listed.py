"""Data sets of image files that lists of the release label: Flowers-102, FGVC-Aircraft, Stanford Cars, by torchvision.

The release's lists number the classes and name them in this order. Each function raises DataError if the data set is
not in `root` and cannot be downloaded, or is damaged.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.images import Source
from pipeline.data.lazy_images import ImageFiles, LazyImages
from pipeline.settings.params import PrepareData
from stages.prepare_data.arrays import reader

_AIRCRAFT_BANNER_ROWS = 20  # a copyright notice, which the release asks to remove


def flowers102(root: Path, params: PrepareData) -> Source:
    """Read Oxford Flowers-102: 2,040 train images, the release's train and validation ones, and 6,149 test images."""
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
    """Read FGVC-Aircraft's 100 variants: train is the release's train and validation images (6,667), test 3,333.

    A text encoder does not know "737-700" as a plane, so the class name is "737-700 aircraft".
    """
    from torchvision.datasets import FGVCAircraft

    read = reader("FGVC-Aircraft", root, f"fgvc-aircraft-2013b.tar.gz in {root}")
    train, test = (read(FGVCAircraft, split=split, download=True) for split in ("trainval", "test"))
    splits = {
        split: _split(root, half._image_files, half._labels, params, _AIRCRAFT_BANNER_ROWS)
        for split, half in (("train", train), ("test", test))
    }
    names = [f"{variant} aircraft" for variant in train.classes]
    return Source(names, splits, "non-commercial research only")


def stanford_cars(root: Path, params: PrepareData) -> Source:
    """Read Stanford Cars: 196 models, 8,144 train and 8,041 test images, which can no longer be downloaded."""
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
    return LazyImages.of(ImageFiles(root, paths, params.image_size, rows_cut), np.asarray(labels, np.int64))
