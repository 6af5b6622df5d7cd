"""Class folders of images, as torchvision's ImageFolder reads them: <class>/<image>.

A class is a folder and its name is the class name, with "_" read as a space. Labels count the class folders in the
order of their names (in NFC). Hidden files, leftovers of systems and files without an image's extension are skipped.
Folders within a class folder are searched too, except links to a folder above.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.file_names import some, utf8
from pipeline.data.image_search import ImageSearch, is_folder
from pipeline.data.lazy_images import ImageFiles, LazyImages
from pipeline.data.split_folders import find_splits, unwrapped
from pipeline.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """Image files relative to the data set's root, and their labels, int64 (N,)."""

    paths: list[str]
    labels: np.ndarray

    def take(self, index: np.ndarray) -> "Listing":
        """Return the files at these positions."""
        return Listing([self.paths[position] for position in index], self.labels[index])


def list_classes(search: ImageSearch, tree: Path) -> tuple[list[str], Listing]:
    """Return the names of the class folders in NFC, sorted, and their images in the order of class and path."""
    paths, labels = [], []
    folders = search.class_folders(tree)
    for label, same_class in enumerate(folders.values()):
        found = search.of_class(*same_class)
        paths += found
        labels += [label] * len(found)
    return list(folders), Listing(paths, np.array(labels, np.int64))


def class_name(folder_name: str) -> str:
    """Return the class name of a folder with this canonical name."""
    return utf8(folder_name).replace("_", " ").strip() or folder_name


def read(root: Path, image_size: int, setting: str) -> tuple[list[str], LazyImages]:
    """List the images of all class folders in `root`, to be read at this height and width.

    If the tree has split folders (see `split_folders`), only its training split is listed.

    Returns:
        The class names by label, and the images, in the order of class and path.

    Raises:
        DataError: The folder is missing or ambiguous, or has no images; the message names the `setting` that gave it.
    """
    if not is_folder(root):
        raise DataError(f"{root} is not a folder. Set {setting} to a tree of <class>/<image> folders.")
    search, tree = ImageSearch(root, setting), unwrapped(root)
    if found := find_splits(tree, setting):
        log.info("%s: the training split %s is used", tree, found.train.name)
        tree = found.train
    classes, listing = list_classes(search, tree)
    if not listing.paths:
        raise DataError(f"{tree} has no images in its class folders ({some(classes)}). Add images.")
    search.log_skipped()
    return [class_name(name) for name in classes], LazyImages.of(
        ImageFiles(root, listing.paths, image_size), listing.labels
    )
