"""Tiny-ImageNet in its release's own layout: class folders for training, one list for validation.

Names are looked up by wnid, because wnids.txt and the class folders differ in their order.
"""

from pathlib import Path

import numpy as np

from pipeline.data.image_folder import Listing
from pipeline.data.image_search import ImageSearch
from pipeline.data.images import Source
from pipeline.settings.params import PrepareData
from stages.prepare_data.trees import lazy_split, lines, require


def tiny_imagenet(root: Path, params: PrepareData) -> Source:
    """Read Tiny-ImageNet as released: train/<wnid>/images/, val/images/ with val_annotations.txt, words.txt.

    Labels count the wnids in sorted order, the order of ImageFolder. A class name is the first of its synonyms in
    words.txt that no other class has. Validation images are the test split; the release's test images have no labels.
    Raise DataError if a file of the release is missing, or names an unknown class.
    """
    where = "Unpack tiny-imagenet-200.zip and set prepare_data.path to the folder that holds wnids.txt."
    for name in ("wnids.txt", "words.txt", "train", "val/val_annotations.txt", "val/images"):
        require((root / name).exists(), f"{root / name} is missing. {where}")
    wnids = sorted(lines(root / "wnids.txt"))
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    search = ImageSearch(root)
    train = [(path, label_of[wnid]) for wnid in wnids for path in search.of_class(root / "train" / wnid)]
    test = []
    for line in lines(root / "val" / "val_annotations.txt"):
        file, wnid, *_ = line.split("\t") + [""]
        require(
            wnid in label_of,
            f"{root / 'val' / 'val_annotations.txt'} names {wnid!r}, which wnids.txt lacks. Get the release again.",
        )
        test.append((f"val/images/{file}", label_of[wnid]))
    splits = {
        split: lazy_split(root, [Listing([path for path, _ in rows], np.array([label for _, label in rows]))], params)
        for split, rows in (("train", train), ("test", test))
    }
    return Source(_synset_names(root, wnids), splits, "that of ImageNet: non-commercial research and education")


def _synset_names(root: Path, wnids: list[str]) -> list[str]:
    """Return one name per wnid, in their order, all different."""
    synonyms_of = dict(line.split("\t", 1) for line in lines(root / "words.txt") if "\t" in line)
    missing = [wnid for wnid in wnids if wnid not in synonyms_of]
    require(not missing, f"{root / 'words.txt'} has no words for {', '.join(missing[:3])}. Get the release again.")
    synonyms = [[word.strip() for word in synonyms_of[wnid].split(",")] for wnid in wnids]
    shared = {word for own in synonyms for word in own if sum(word in other for other in synonyms) > 1}
    return [
        next((word for word in own if word not in shared), f"{own[0]} {wnid}")
        for wnid, own in zip(wnids, synonyms, strict=True)
    ]
