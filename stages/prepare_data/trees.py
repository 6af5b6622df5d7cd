"""Data sets that are trees of image files: ImageFolder layout, with or without domains.

A class is a folder and its name is the class name ("_" read as a space), so that names and labels agree by
construction: labels count the class folders in the order of their names, as torchvision's ImageFolder does. Hidden
files and files whose name does not end as an image's are no images. Folders within a class folder are searched too;
one that leads back to a folder it stands in is not.
"""

import logging
import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import seeding
from pipeline.errors import PipelineError
from pipeline.images import Source, stratified_split
from pipeline.params import PrepareData
from stages.prepare_data.decode import EXTENSIONS
from stages.prepare_data.lazy_images import ImageFiles, LazyImages

log = logging.getLogger(__name__)

_TEST_FRACTION = 0.2
_UNKNOWN_TERMS = "unknown: see the folder's own terms"


@dataclass(frozen=True)
class Listing:
    """Image files relative to the data set's root, and their labels, int64 (N,)."""

    paths: list[str]
    labels: np.ndarray

    def take(self, index: np.ndarray) -> "Listing":
        """The files at these positions."""
        return Listing([self.paths[position] for position in index], self.labels[index])


def folder(root: Path, params: PrepareData) -> Source:
    """Any tree of images in ImageFolder layout.

    `root` holds either `train/` and `test/` (or `val/`) with the same class folders in both, or class folders alone,
    of which one image in five, stratified and drawn by the seed, becomes the test split.

    Raises:
        PipelineError: the folder is missing, a class folder holds anything but images, or the splits' classes differ.
    """
    require(root.is_dir(), f"{root} is not a folder: set prepare_data.path to a tree of <class>/<image> folders")
    classes, halves = _halves(root, root, params.seed)
    if in_every_class := _folders_in_every(root, classes):
        log.warning(
            "every class folder of %s holds folders named %s: if these are the classes, set source: domain-folder",
            root, in_every_class,
        )  # fmt: skip
    splits = {split: lazy_split(root, [half], params) for split, half in halves.items()}
    return Source([_words(name) for name in classes], splits, _UNKNOWN_TERMS)


def domain_folder(
    root: Path, params: PrepareData, class_name: Callable[[str], str] | None = None, licence: str = _UNKNOWN_TERMS
) -> Source:
    """A tree with one level of domains, each in a layout that `folder` reads, such as Office-Caltech-10.

    Domains are numbered in the order of their folders' names; images are in the order of domain, class and path.
    A domain without train and test folders is split by itself: one image in five, stratified by class.

    Raises:
        PipelineError: as `folder`, and when a domain lacks a class folder that another has.
    """
    require(root.is_dir(), f"{root} is not a folder: set prepare_data.path to a tree of <domain>/<class>/<image>")
    domains = _subfolders(root)
    read = {domain: _halves(root, root / domain, params.seed, domain) for domain in domains}
    every_class = sorted({name for classes, _ in read.values() for name in classes})
    for domain, (classes, _) in read.items():
        missing = _some(set(every_class) - set(classes))
        require(not missing, f"{root / domain} lacks class folders that other domains have: {missing}")
    splits = {
        split: lazy_split(root, [halves[split] for _, halves in read.values()], params) for split in ("train", "test")
    }
    names = [(class_name or _words)(name) for name in every_class]
    return Source(names, splits, licence, [_readable(domain) for domain in domains])


def digits_five(root: Path, params: PrepareData) -> Source:
    """Digits-Five or its four-domain form: a tree of domains whose class folders are 0 to 9.

    Its domains are handwritten, printed and photographed: the class name is "number 3", true of all.

    Raises:
        PipelineError: as `domain_folder`, and when the class folders are not 0 to 9.
    """
    source = domain_folder(root, params, lambda digit: f"number {digit}", "that of its domains' data sets")
    expected = [f"number {digit}" for digit in range(10)]
    require(source.class_names == expected, f"{root}: the class folders of every domain must be 0 to 9")
    return source


def _halves(root: Path, tree: Path, seed: int, *stream: str) -> tuple[list[str], dict[str, Listing]]:
    """Class folders of one tree, sorted, and its files by split; `stream` names the split's generator."""
    if (tree / "train").is_dir() and ((tree / "test").is_dir() or (tree / "val").is_dir()):
        test_dir = tree / ("test" if (tree / "test").is_dir() else "val")
        classes, train = _tree(root, tree / "train")
        test_classes, test = _tree(root, test_dir)
        differing = _some(set(classes) ^ set(test_classes))
        require(not differing, f"{tree}: train and {test_dir.name} differ in their class folders: {differing}")
        return classes, {"train": train, "test": test}
    classes, everything = _tree(root, tree)
    require(classes != ["train"], f"{tree} has a train folder but neither test nor val beside it: add one")
    test_rows = max(1, round(_TEST_FRACTION * len(everything.labels)))
    rng = seeding.numpy_generator(seed, "train/test split", *stream)
    in_test, in_train = stratified_split(everything.labels, test_rows, rng)
    return classes, {"train": everything.take(in_train), "test": everything.take(in_test)}


def _tree(root: Path, tree: Path) -> tuple[list[str], Listing]:
    """The class folders, sorted, and their images in the order of class and path."""
    classes = _subfolders(tree)
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = images_of_class(root, tree / name)
        paths += found
        labels += [label] * len(found)
    return classes, Listing(paths, np.array(labels, np.int64))


def images_of_class(root: Path, class_dir: Path) -> list[str]:
    """Paths relative to `root`, sorted by folder, then name, as ImageFolder does.

    An empty folder stands for a class that this owner has no images of, as it happens to a node of a federation.
    """
    found = sorted(_image_files(str(class_dir), frozenset()), key=os.path.split)
    if not found and all(name.startswith(".") for name in os.listdir(class_dir)):
        log.warning("%s is empty: a class without images", class_dir)
        return []
    require(bool(found), f"{class_dir} has no images (names ending in {', '.join(EXTENSIONS[:5])}, ...)")
    return [path.removeprefix(f"{root}{os.sep}") for path in found]


def _image_files(directory: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Image files in and below a folder, following links except into one of the folders `above` (device, inode)."""
    try:
        status = os.stat(directory)
        entries = list(os.scandir(directory))
    except OSError as error:
        raise PipelineError(f"{directory} cannot be read: {error.strerror}") from None
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _image_files(entry.path, above | {here})
        elif entry.name.lower().endswith(EXTENSIONS):
            yield entry.path


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _subfolders(directory: Path) -> list[str]:
    """Names of the folders in a folder, sorted, hidden ones left out."""
    try:
        names = sorted(entry.name for entry in os.scandir(directory) if _is_folder(entry) and entry.name[0] != ".")
    except OSError as error:
        raise PipelineError(f"{directory} cannot be read: {error.strerror}") from None
    require(bool(names), f"{directory} has no folders: it must be a tree of <class>/<image>")
    return names


def lazy_split(root: Path, listings: list[Listing], params: PrepareData) -> LazyImages:
    """Listings one after the other, each a domain."""
    paths = [path for listing in listings for path in listing.paths]
    labels = np.concatenate([listing.labels for listing in listings])
    domains = np.repeat(np.arange(len(listings)), [len(listing.labels) for listing in listings])
    files = ImageFiles(root, paths, params.image_size)
    return LazyImages.of(files, labels, domains, skip_broken=params.broken_images == "skip")


def _words(folder_name: str) -> str:
    """The class name that a folder's name stands for."""
    return _readable(folder_name).replace("_", " ").strip() or folder_name


def _readable(folder_name: str) -> str:
    """A folder's name in the one form that every file system's way of writing accents comes to."""
    try:
        name = os.fsencode(folder_name).decode()  # the bytes on disk, whatever the language of this session
    except UnicodeDecodeError:
        raise PipelineError(f"the folder {os.fsencode(folder_name)!r} has no UTF-8 name: rename it") from None
    return unicodedata.normalize("NFC", name)


def _folders_in_every(root: Path, classes: list[str]) -> str:
    """Names of at least two folders that each class folder holds, or nothing."""
    if any(not (root / name).is_dir() for name in classes):  # they stand in train and test
        return ""
    held = [{entry.name for entry in os.scandir(root / name) if _is_folder(entry)} for name in classes]
    shared = set.intersection(*held)
    return _some(shared) if len(shared) > 1 else ""


def _some(names: set[str]) -> str:
    """The first five names, and how many more there are."""
    first, more = sorted(names)[:5], len(names) - 5
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def lines(file: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"{file} cannot be read ({error})") from None


def require(condition: bool, message: str) -> None:
    """Raises PipelineError with this message unless the condition holds."""
    if not condition:
        raise PipelineError(message)
