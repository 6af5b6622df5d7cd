"""Find the image files of a tree, in an order that does not depend on the file system, and count skipped files.

A listing costs no look at the files themselves: the type of an entry comes with its name (os.scandir), so that trees of
hundreds of thousands of files are listed in seconds.
"""

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError, PipelineError
from pipeline.io.system_errors import refusal
from stages.prepare_data.decode import ENDINGS, HEIF_ADVICE, HEIF_ENDINGS
from stages.prepare_data.file_names import canonical, ending, is_leftover

log = logging.getLogger(__name__)

_UNREAD_IMAGES = frozenset(
    {*HEIF_ENDINGS, ".heics", ".jxl", ".jp2", ".svg", ".psd", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf"}
) - frozenset(ENDINGS)
"""Endings of images that are not read: to pass them over is a warning."""


class ImageSearch:
    """The image files under `root`, class by class, and what was passed over by ending."""

    def __init__(self, root: Path) -> None:
        """Start without searching."""
        self.root = root
        self.passed_over: Counter[str] = Counter()
        self.outside = 0  # images beside the class folders

    def class_folders(self, tree: Path) -> dict[str, list[Path]]:
        """The class folders of a tree by name (in NFC), in the order of the names.

        Two folders whose names differ only in how an accent is written are one class.

        Raises:
            DataError: There is none, or a folder cannot be read.
        """
        folders: dict[str, list[Path]] = {}
        for name in subfolders(tree):
            folders.setdefault(canonical(name), []).append(tree / name)
        if not folders:
            raise DataError(f"{tree} has no folders. It must be a tree of <class>/<image>.")
        self.count_outside(tree)
        return folders

    def count_outside(self, tree: Path) -> None:
        """Count the images that are beside the folders of a tree."""
        self.outside += len(_images_in(tree))

    def of_class(self, *folders: Path) -> list[str]:
        """Image files of one class, whose images are in one or more folders and in folders below.

        An empty folder is a class that this owner has no images of, as it happens to a node of a federation.

        Returns:
            Paths relative to the root, sorted by folder, then name (in NFC), as ImageFolder does.

        Raises:
            DataError: There are files and none is an image, or a folder cannot be read.
        """
        passed_over: Counter[str] = Counter()
        found = [path for folder in folders for path in _image_files(str(folder), passed_over, frozenset())]
        if not found and passed_over:
            raise DataError(
                f"{folders[0]} has no images (names that end in {', '.join(ENDINGS[:5])}, ...), only "
                f"{_counts(passed_over)}. {_advice(passed_over) or 'Add images, or remove the folder'}."
            )
        self.passed_over += passed_over
        prefix = os.path.join(self.root, "")
        paths = [path.removeprefix(prefix) for path in found]
        return sorted(paths, key=lambda path: (*os.path.split(canonical(path)), path))

    def say_passed_over(self) -> None:
        """Log how many images are outside class folders, and how many files were skipped, by extension."""
        if self.outside:
            log.warning("%s: images in no class folder, left out: %d", self.root, self.outside)
        if not self.passed_over:
            return
        if advice := _advice(self.passed_over):
            log.warning("%s: files passed over: %s. %s.", self.root, _counts(self.passed_over), advice)
        else:
            log.info("%s: files passed over: %s", self.root, _counts(self.passed_over))


def has_images(folder: Path) -> bool:
    """Return whether a folder or one below it holds an image file."""
    return next(_image_files(str(folder), Counter(), frozenset()), None) is not None


def holds_images_itself(folder: Path) -> bool:
    """Return whether image files are directly in a folder."""
    return bool(_images_in(folder))


def is_folder(path: Path) -> bool:
    """Return whether a folder is at this path.

    Raises:
        SystemRefusal: The system does not tell.
    """
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if refused := refusal(error, path):
            raise refused from None
        return False


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted by their NFC form, without what systems leave.

    Raises:
        DataError: The folder cannot be read.
    """
    names = [entry.name for entry in _entries(str(folder)) if _is_folder(entry)]
    return sorted(names, key=lambda name: (canonical(name), name))


def _image_files(directory: str, passed_over: Counter[str], above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Image files in and below a folder, following links except into one of the folders `above` (device, inode)."""
    entries = _entries(directory)
    here = _identity(directory)
    if here in above:
        return
    for entry in entries:
        if _is_folder(entry):
            yield from _image_files(entry.path, passed_over, above | {here})
        elif entry.name.lower().endswith(ENDINGS):
            yield entry.path
        else:
            passed_over[ending(entry.name)] += 1


def _identity(directory: str) -> tuple[int, int]:
    """Device and inode."""
    try:
        status = os.stat(directory)
    except OSError as error:
        raise _unreadable(error, directory) from None
    return status.st_dev, status.st_ino


def _images_in(folder: Path) -> list[str]:
    return [one.name for one in _entries(str(folder)) if one.name.lower().endswith(ENDINGS) and not _is_folder(one)]


def _entries(directory: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, without those that systems leave."""
    try:
        with os.scandir(directory) as entries:
            return [entry for entry in entries if not is_leftover(entry.name)]
    except OSError as error:
        raise _unreadable(error, directory) from None


def _unreadable(error: OSError, directory: str) -> PipelineError:
    return refusal(error, Path(directory)) or DataError(f"{directory} cannot be read ({error.strerror}).")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one; a circular link is not."""
    try:
        return entry.is_dir()
    except OSError as error:
        if refused := refusal(error, Path(entry.path)):
            raise refused from None
        return False


def _counts(passed_over: Counter[str]) -> str:
    """The most frequent endings with their numbers: ".heic: 214, no ending: 3"."""
    ordered = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    more = sum(count for _, count in ordered[6:])
    return ", ".join(f"{end}: {count}" for end, count in ordered[:6]) + (f", others: {more}" if more else "")


def _advice(passed_over: Counter[str]) -> str:
    """What to do about images that are not read; nothing if none was passed over."""
    unread = _UNREAD_IMAGES & passed_over.keys()
    if unread & {*HEIF_ENDINGS}:
        return HEIF_ADVICE
    return "Convert the images among them to JPEG or PNG" if unread else ""
