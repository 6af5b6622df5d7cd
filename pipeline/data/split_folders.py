"""Find the split folders of a tree, train/ and test/, in their usual spellings.

A split folder holds class folders and is named "train", "Testing", "val", "valid_set", "seg_test", ... Ambiguous
trees are rejected: if a split were read as a class, training would see the test images.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.file_names import canonical, some_folders
from pipeline.data.image_search import count_images, has_images, subfolders
from pipeline.errors import DataError

_SPELLINGS = {
    "train": ("train", "training", "trn", "trainval"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
    "validation": ("val", "valid", "validation", "validate", "dev", "devel", "development"),
}
SPLIT_OF_WORD = {word: split for split, words in _SPELLINGS.items() for word in words}
"""train, test or validation, by each of its spellings."""

_NAME = re.compile(
    r"(?:\d+[ _.-]+)?(?P<word>[a-z]+?)(?:[ _.-]*(?:set|data|dataset|split|images|imgs|folder))?[ _.-]*\d*"
)
_LETTERED = re.compile(r"(?P<word>train|test|val)[ _-]?[A-Z]", re.IGNORECASE)
_MAX_WRAPPERS = 8


@dataclass(frozen=True)
class SplitFolders:
    """The split folders of a tree, and those left out: validation, and `no_classes`, which lack class folders."""

    train: Path
    test: Path
    validation: Path | None
    no_classes: list[str]

    def described(self, tree: Path) -> str:
        """Describe which folder is which split, and which are left out."""
        train = _inside(tree, self.train)
        text = f"{train} is the training split, {_inside(tree, self.test)} the test split"
        if self.validation:
            text += f"; {_inside(tree, self.validation)} is left out (to train on it too, move its images into {train})"
        if self.no_classes:
            text += f"; left out, without class folders: {some_folders(self.no_classes)}"
        return text


def find_splits(tree: Path, setting: str = "prepare_data.path") -> SplitFolders | None:
    """Return the splits of a tree, or None if its folders are class folders.

    Validation images are the test split if there is no other, and are left out otherwise. Raise DataError if the tree
    is ambiguous, or training or test images are missing; errors name the `setting` of params.yaml that gave it.
    """
    folders = subfolders(tree)
    splits = _by_split(folders)
    named = _names(splits)
    if not named:
        _check_no_lettered_splits(tree, folders)
        return None
    others = [name for name in folders if name not in named]
    with_images = [name for name in others if has_images(tree / name)]
    if with_images:
        if all(count_images(tree / name) or not subfolders(tree / name) for name in named):
            return None  # classes with such a name, like the train among vehicles
        raise DataError(
            f"{tree} holds folders named as splits ({some_folders(named)}) beside other folders with images "
            f"({some_folders(with_images)}). If the former are splits, move the others elsewhere; if they are classes, "
            "put their images directly into them."
        )
    return _chosen(tree, splits, others, setting)


def _check_no_lettered_splits(tree: Path, folders: list[str]) -> None:
    """Reject trainA, trainB, testA, ...: two domains without classes, as in data sets for image translation."""
    found = {name: match["word"].lower() for name in folders if (match := _LETTERED.fullmatch(canonical(name)))}
    if len(set(found.values())) > 1:
        raise DataError(
            f"{tree} holds folders named as splits with a letter ({some_folders(found)}). If they are domains, make a "
            "tree of <domain>/<split>/<class>/<image> and set source: domain-folder; if they are classes, rename them."
        )


def unwrapped(tree: Path) -> Path:
    """Return the folder that holds the splits if it is nested in others, as archives unpack; else `tree`."""
    return _unwrapped(tree, lambda inner: bool(_by_split(subfolders(inner))))


def unwrapped_domains(tree: Path) -> Path:
    """Return the folder that holds domains with their own splits if it is nested in others; else `tree`."""
    return _unwrapped(tree, lambda inner: all(is_split_tree(inner / name) for name in subfolders(inner)))


def is_split_tree(tree: Path) -> bool:
    """Return whether all folders of a tree are named as splits, the training split and another one among them."""
    folders = subfolders(tree)
    splits = _by_split(folders)
    return "train" in splits and len(splits) > 1 and len(_names(splits)) == len(folders)


def _unwrapped(tree: Path, is_wanted: Callable[[Path], bool]) -> Path:
    inner = tree
    for _ in range(_MAX_WRAPPERS):
        folders = subfolders(inner)
        if len(folders) != 1 or _split_of(folders[0]) or count_images(inner):
            break
        inner = inner / folders[0]
        if subfolders(inner) and is_wanted(inner):
            return inner
    return tree


def _chosen(tree: Path, splits: dict[str, list[str]], others: list[str], setting: str) -> SplitFolders:
    folder_of: dict[str, Path] = {}
    unlabelled = []
    for split, names in splits.items():
        filled = [name for name in names if subfolders(tree / name)]
        if len(filled) > 1:
            raise DataError(
                f"{tree} has two folders for one split, {split}: {some_folders(filled)}. Merge them, or move one away."
            )
        if filled:
            folder_of[split] = _innermost(tree / filled[0], split)
        unlabelled += [name for name in names if name not in filled and count_images(tree / name)]
    validation = folder_of.get("validation")
    train, test = folder_of.get("train"), folder_of.get("test", validation)
    if train is None or test is None:
        missing = "train" if train is None else "test"
        what = "Images without class folders" if unlabelled else "Found"
        found = f"{what}: {some_folders(unlabelled or _names(splits))}"
        instead = f", or set {setting} to {train}, whose folders are then the classes"
        raise DataError(
            f"{tree} has split folders, but none with class folders for the {missing} split. {found}. Arrange it as "
            f"{missing}/<class>/<image>{instead if train else ''}."
        )
    return SplitFolders(train, test, None if test == validation else validation, [*unlabelled, *others])


def _innermost(folder: Path, split: str) -> Path:
    """Return the inner train/ of train/train/<class>, as some archives unpack."""
    while len(inner := subfolders(folder)) == 1 and (_split_of(inner[0]) == split or inner[0] == folder.name):
        if not subfolders(folder / inner[0]):
            break
        folder = folder / inner[0]
    return folder


def _by_split(folders: list[str]) -> dict[str, list[str]]:
    """Return the folders by the split that they are named after, without a common prefix (seg_train, seg_test)."""
    prefix = os.path.commonprefix(folders) if len(folders) > 1 else ""
    shared = prefix[: 1 + max(map(prefix.rfind, " _.-"))]
    splits: dict[str, list[str]] = {}
    for name in folders:
        if split := _split_of(name) or _split_of(name.removeprefix(shared)):
            splits.setdefault(split, []).append(name)
    return splits


def _split_of(name: str) -> str | None:
    match = _NAME.fullmatch(canonical(name).casefold().strip())
    return SPLIT_OF_WORD.get(match["word"]) if match else None


def _names(splits: dict[str, list[str]]) -> list[str]:
    return [name for names in splits.values() for name in names]


def _inside(tree: Path, folder: Path) -> str:
    return f"{canonical(str(folder.relative_to(tree)))}/"
