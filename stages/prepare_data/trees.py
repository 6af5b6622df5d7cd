"""Data sets that are trees of class folders (see `pipeline.data.image_folder`), with or without domains."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data import image_folder
from pipeline.data.file_names import canonical, some, some_folders, utf8
from pipeline.data.image_folder import Listing, list_classes
from pipeline.data.image_search import ImageSearch, count_images, is_folder, subfolders
from pipeline.data.images import Source, draw_test
from pipeline.data.lazy_images import ImageFiles, LazyImages
from pipeline.data.split_folders import find_splits, is_split_tree, unwrapped, unwrapped_domains
from pipeline.errors import DataError
from pipeline.io.system_errors import refusal
from pipeline.settings.params import PrepareData

log = logging.getLogger(__name__)

_UNKNOWN_TERMS = "unknown: see the folder's own terms"


@dataclass(frozen=True)
class Tree:
    """A tree of class folders: names of the classes in NFC, files by split, and a description of the splits' origin."""

    classes: list[str]
    splits: dict[str, Listing]
    origin: str
    has_split_folders: bool


def folder(root: Path, params: PrepareData) -> Source:
    """Read any tree of images in ImageFolder layout.

    `root`, or the only folder in it, holds either split folders with the same class folders in each (see
    `split_folders`), or only class folders, of which one image in five, stratified and drawn by the seed, becomes
    the test split.

    Raises:
        DataError: The folder is missing or ambiguous, a class folder has files but no image, or the splits' classes
            differ.
    """
    require(is_folder(root), f"{root} is not a folder. Set prepare_data.path to a tree of <class>/<image> folders.")
    search, tree = ImageSearch(root), unwrapped(root)
    found = _tree(search, tree, params.seed)
    log.info("%s: %s", tree, found.origin)
    search.log_skipped()
    if not found.has_split_folders:
        _warn_about_nested_folders(tree)
    splits = {split: lazy_split(root, [listing], params) for split, listing in found.splits.items()}
    return Source([image_folder.class_name(name) for name in found.classes], splits, _UNKNOWN_TERMS)


def domain_folder(
    root: Path, params: PrepareData, class_name: Callable[[str], str] | None = None, licence: str = _UNKNOWN_TERMS
) -> Source:
    """Read a tree with one level of domains, each in a layout that `folder` reads, such as Office-Caltech-10.

    Domains are numbered in the order of their folders' names (in NFC); images are in the order of domain, class and
    path. Of a domain without split folders, one image in five, stratified by class, becomes the test split.

    Raises:
        DataError: See `folder`; also if the folders are splits, or a domain lacks a class folder that another has.
    """
    layout = "<domain>/<class>/<image>"
    require(is_folder(root), f"{root} is not a folder. Set prepare_data.path to a tree of {layout}.")
    require(
        not is_split_tree(root),
        f"{root} holds splits ({some_folders(subfolders(root))}), not domains. Arrange it as "
        "<domain>/<split>/<class>/<image>, or set prepare_data.source: folder if it has no domains.",
    )
    search, top = ImageSearch(root), unwrapped_domains(root)
    folders = subfolders(top)
    require(bool(folders), f"{top} has no folders. Set prepare_data.path to a tree of {layout}.")
    domains = [utf8(canonical(name)) for name in folders]
    named = zip(folders, domains, strict=True)
    read = {name: _tree(search, unwrapped(top / name), params.seed, domain) for name, domain in named}
    every_class = sorted({name for tree in read.values() for name in tree.classes})
    for domain, tree in read.items():
        missing = some(set(every_class) - set(tree.classes))
        message = f"{top / domain} lacks class folders that other domains have: {missing}. Add them; they may be empty."
        require(not missing, message)
    _log_origins(top, read)
    search.log_skipped()
    splits = {
        split: lazy_split(root, [tree.splits[split] for tree in read.values()], params) for split in ("train", "test")
    }
    names = [(class_name or image_folder.class_name)(name) for name in every_class]
    return Source(names, splits, licence, domains)


def digits_five(root: Path, params: PrepareData) -> Source:
    """Read Digits-Five or its four-domain form: a tree of domains, whose class folders must be 0 to 9.

    Its domains are handwritten, printed and photographed, so the class name is just "number 3".
    """
    source = domain_folder(root, params, lambda digit: f"number {digit}", "that of its domains' data sets")
    expected = [f"number {digit}" for digit in range(10)]
    require(source.class_names == expected, f"{root} has class folders other than 0 to 9. Rename or remove them.")
    return source


def _tree(search: ImageSearch, tree: Path, seed: int, *stream: str) -> Tree:
    """List one tree; `stream` names the generator that draws a test split."""
    if found := find_splits(tree):
        search.count_outside(tree)
        classes, train = list_classes(search, found.train)
        test_classes, test = list_classes(search, found.test)
        differing = some(set(classes) ^ set(test_classes))
        message = f"{tree}: {found.train.name} and {found.test.name} differ in their class folders: {differing}. "
        require(not differing, message + "Add the missing ones (they may be empty), or use one spelling.")
        return Tree(classes, {"train": train, "test": test}, found.described(tree), True)
    _refuse_splits_of_classes(tree)
    classes, everything = list_classes(search, tree)
    require(bool(everything.paths), f"{tree} has no images in its class folders ({some(classes)}). Add images.")
    in_train, in_test = draw_test(everything.labels, seed, *stream)
    drawn = {"train": everything.take(in_train), "test": everything.take(in_test)}
    return Tree(classes, drawn, "no split folders; one image in five, stratified by class, is the test split", False)


def _refuse_splits_of_classes(tree: Path) -> None:
    """Reject <class>/<split>/<image> and <domain>/<split>/<class>/<image>, which would mix the splits."""
    for name in subfolders(tree):
        if not is_split_tree(inner := tree / name):
            continue
        splits = subfolders(inner)
        advice = "Arrange the tree as <split>/<class>/<image>, or put all images of a class directly into its folder"
        if any(subfolders(inner / split) for split in splits):
            advice = f"If {canonical(name)} is a domain, set prepare_data.source: domain-folder"
        raise DataError(f"{inner} holds splits ({some_folders(splits)}) where a class folder is expected. {advice}.")


def _warn_about_nested_folders(tree: Path) -> None:
    """Warn if the class folders look like domains, or like a folder around the classes."""
    classes = subfolders(tree)
    held = [subfolders(tree / name) for name in classes]
    if len(held[0]) < 2 or any(count_images(tree / name) for name in classes):
        return
    if len(classes) == 1:
        log.warning(
            "%s is one class that holds the folders %s. If these are the classes, set prepare_data.path to it",
            tree / classes[0], some_folders(held[0]),
        )  # fmt: skip
    elif len({tuple(map(canonical, names)) for names in held}) == 1:
        log.warning(
            "every class folder of %s holds folders named %s. If the folders are domains, not classes, set "
            "prepare_data.source: domain-folder",
            tree, some_folders(held[0]),
        )  # fmt: skip


def _log_origins(root: Path, read: dict[str, Tree]) -> None:
    """Log one line per origin of the domains' splits."""
    domains_of: dict[str, list[str]] = {}
    for domain, tree in read.items():
        domains_of.setdefault(tree.origin, []).append(domain)
    for origin, domains in list(domains_of.items())[:3]:
        log.info("%s: %s: %s", root, some_folders(domains), origin)
    if len(domains_of) > 3:
        log.info("%s: other domains have split folders of %d more kinds", root, len(domains_of) - 3)


def lazy_split(root: Path, listings: list[Listing], params: PrepareData) -> LazyImages:
    """Concatenate listings, each of which is a domain."""
    paths = [path for listing in listings for path in listing.paths]
    labels = np.concatenate([listing.labels for listing in listings])
    domains = np.repeat(np.arange(len(listings)), [len(listing.labels) for listing in listings])
    return LazyImages.of(ImageFiles(root, paths, params.image_size), labels, domains)


def lines(file: Path) -> list[str]:
    """Return the lines of a text file that are not blank."""
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise refusal(error, file) or DataError(f"{file} cannot be read ({error}). Get it again.") from None


def require(condition: bool, message: str) -> None:
    """Raise DataError with this message unless the condition holds."""
    if not condition:
        raise DataError(message)
