"""Find the image files of a tree, in an order that does not depend on the file system, and count skipped files.

os.scandir gives an entry's type with its name, so hundreds of thousands of files are listed in seconds.
"""

import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.data.decode import ENDINGS, HEIF_ADVICE, HEIF_ENDINGS
from pipeline.data.file_names import canonical, ending, is_leftover
from pipeline.errors import DataError, PipelineError
from pipeline.io.system_errors import refusal

log = logging.getLogger(__name__)

_UNREAD_IMAGES = frozenset(
    {*HEIF_ENDINGS, ".heics", ".jxl", ".jp2", ".svg", ".psd", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf"}
) - frozenset(ENDINGS)
"""Extensions of images that cannot be read; skipping them is a warning."""


class ImageSearch:
    """The image files under `root`, class by class, and the number of skipped files by extension."""

    def __init__(self, root: Path, setting: str = "prepare_data.path") -> None:
        """Start without searching; errors name the `setting` of params.yaml that gave the root."""
        self.root, self._setting = root, setting
        self.skipped: Counter[str] = Counter()
        self.outside = 0  # images beside the class folders

    def class_folders(self, tree: Path) -> dict[str, list[Path]]:
        """Return the class folders by name (in NFC), in the order of the names; raise DataError if there is none.

        Two folders whose names differ only in the encoding of an accent are one class.
        """
        folders: dict[str, list[Path]] = {}
        for name in subfolders(tree):
            folders.setdefault(canonical(name), []).append(tree / name)
        if not folders:
            raise DataError(f"{tree} has no folders. Set {self._setting} to a tree of <class>/<image>.")
        self.count_outside(tree)
        return folders

    def count_outside(self, tree: Path) -> None:
        """Count the images beside the folders of a tree."""
        self.outside += count_images(tree)

    def of_class(self, *folders: Path) -> list[str]:
        """List the image files in a class's folders and below: paths relative to the root, in the order of ImageFolder.

        Raise DataError if there are files and none is an image; empty folders are allowed, as a node may lack a class.
        """
        skipped: Counter[str] = Counter()
        found = [path for folder in folders for path in _image_files(folder, skipped)]
        if not found and skipped:
            raise DataError(
                f"{folders[0]} has no images (names that end in {', '.join(ENDINGS[:5])}, ...), only "
                f"{_counts(skipped)}. {_advice(skipped) or 'Add images, or remove the folder'}."
            )
        self.skipped += skipped
        prefix = os.path.join(self.root, "")
        paths = [path.removeprefix(prefix) for path in found]
        return sorted(paths, key=lambda path: (*os.path.split(canonical(path)), path))

    def log_skipped(self) -> None:
        """Log how many images are outside class folders, and how many files were skipped, by extension."""
        if self.outside:
            log.warning("%s: %d images outside the class folders were skipped", self.root, self.outside)
        advice = _advice(self.skipped)
        if advice:
            log.warning("%s: files skipped: %s. %s.", self.root, _counts(self.skipped), advice)
        elif self.skipped:
            log.info("%s: files skipped: %s", self.root, _counts(self.skipped))


def has_images(folder: Path) -> bool:
    """Return whether a folder or one below it holds an image file."""
    return next(_image_files(folder, Counter()), None) is not None


def count_images(folder: Path) -> int:
    """Return the number of image files directly in a folder."""
    return sum(one.name.lower().endswith(ENDINGS) and not _is_folder(one) for one in _entries(str(folder)))


def is_folder(path: Path) -> bool:
    """Return whether the path is a folder; raise SystemRefusal if the system refuses to say."""
    return _is_directory(lambda: stat.S_ISDIR(path.stat().st_mode), path)


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted by their NFC form, without leftovers of systems."""
    names = [entry.name for entry in _entries(str(folder)) if _is_folder(entry)]
    return sorted(names, key=lambda name: (canonical(name), name))


def files_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the files in and below a folder, without leftovers of systems, following links except into a folder above.

    Raise DataError if a folder cannot be read, or SystemRefusal if the system refuses to.
    """
    return _files_below(str(folder), frozenset())


def _image_files(folder: Path, skipped: Counter[str]) -> Iterator[str]:
    """Yield the image files in and below a folder, and count the others."""
    for entry in files_below(folder):
        if entry.name.lower().endswith(ENDINGS):
            yield entry.path
        else:
            skipped[ending(entry.name)] += 1


def _files_below(directory: str, above: frozenset[tuple[int, int]]) -> Iterator[os.DirEntry[str]]:
    """Yield the files in and below a folder; `above` are the device and inode of each folder above it."""
    entries = _entries(directory)
    try:
        status = os.stat(directory)
    except OSError as error:
        raise _unreadable(error, directory) from None
    here = status.st_dev, status.st_ino
    if here in above:
        return
    for entry in entries:
        if _is_folder(entry):
            yield from _files_below(entry.path, above | {here})
        else:
            yield entry


def _entries(directory: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, without leftovers of systems."""
    try:
        with os.scandir(directory) as entries:
            return [entry for entry in entries if not is_leftover(entry.name)]
    except OSError as error:
        raise _unreadable(error, directory) from None


def _unreadable(error: OSError, directory: str) -> PipelineError:
    return refusal(error, Path(directory)) or DataError(f"{directory} cannot be read ({error.strerror}).")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one; a circular link is not."""
    return _is_directory(entry.is_dir, Path(entry.path))


def _is_directory(ask: Callable[[], bool], path: Path) -> bool:
    try:
        return ask()
    except OSError as error:
        if refused := refusal(error, path):
            raise refused from None
        return False


def _counts(skipped: Counter[str]) -> str:
    """Return the most frequent extensions with their numbers: ".heic: 214, no ending: 3"."""
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    more = sum(count for _, count in ordered[6:])
    return ", ".join(f"{end}: {count}" for end, count in ordered[:6]) + (f", others: {more}" if more else "")


def _advice(skipped: Counter[str]) -> str:
    """Return what to do about images that cannot be read; "" if none was skipped."""
    unread = _UNREAD_IMAGES & skipped.keys()
    if unread & {*HEIF_ENDINGS}:
        return HEIF_ADVICE
    return "Convert the images among them to JPEG or PNG" if unread else ""
