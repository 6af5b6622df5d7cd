"""The files of a data set in large files: where they are, and which split each belongs to.

The words of a file's name, or of a folder above it, name its split (train-00000-of-00003.parquet, val/12.tar), in the
spellings of `pipeline.data.split_folders`. As for folders, validation files become the test split if it is missing.
"""

import glob
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from pipeline.data.file_names import canonical, some
from pipeline.data.image_search import files_below
from pipeline.data.split_folders import SPLIT_OF_WORD
from pipeline.errors import DataError
from pipeline.io import system_errors
from pipeline.text import first_few

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_FILES = 10**6  # of a pattern
_LFS_POINTER = b"version https://git-lfs"


def find(path: Path, endings: tuple[str, ...]) -> tuple[Path, list[str]]:
    """Return the files with these endings that a path names: a folder and all below, one file, or a pattern of files.

    A pattern has *, ? and [] as in a shell, and braces: {train,val}, {000..146}. The folders above that exist are taken
    as they are, whatever marks are in their names.

    Returns:
        The folder that holds all files, and their names relative to it, with "/", sorted.

    Raises:
        DataError: There are none, a file of a pattern with braces is missing, or a file is a pointer of git-lfs.
    """
    status = system_errors.status(path)
    if status is None and is_pattern(_below_existing(path)[1]):
        root, names = _matching(path)
    elif status is None:
        raise DataError(f"{path} does not exist. Set prepare_data.path to a folder, or a pattern of files.")
    elif path.is_dir():
        root, names = path, _below(path, endings)
    else:
        root, names = path.parent, [path.name]
    if not names:
        raise DataError(f"{path} has no files that end in {' or '.join(endings)}. Set prepare_data.path to them.")
    for name in names:
        if not name.lower().endswith(endings):
            advice = "Decompress it" if name.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")) else "Change the pattern"
            raise DataError(f"{root / name} does not end in {' or '.join(endings)}. {advice}.")
        _refuse_pointer(root / name)
    return root, names


def is_pattern(text: str) -> bool:
    """Return whether a path has the marks of a pattern."""
    return any(mark in text for mark in "*?[{")


def expanded(pattern: str) -> list[str]:
    """Write out the braces of a pattern: a{1,2} is a1 and a2; {08..10} is 08, 09 and 10."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    rests = expanded(pattern[found.end() :])
    words: Iterable[str]
    if limits := _RANGE.fullmatch(found[1]):
        first, last = int(limits[1]), int(limits[2])
        count = last - first + 1
        width = len(limits[1]) if limits[1].startswith("0") or len(limits[1]) == len(limits[2]) else 0
        words = (f"{number:0{width}d}" for number in range(first, last + 1))
    else:
        words = found[1].split(",")
        count = len(words)
    if count * len(rests) > _MOST_FILES:
        raise DataError(f"The pattern {pattern} names more than {_MOST_FILES:,} files. Correct its braces.")
    return [pattern[: found.start()] + word + rest for word, rest in itertools.product(words, rests)]


def by_split(title: str, names: Sequence[str], one_set: bool) -> dict[str, list[str]]:
    """Group files by the split that their names tell: train, test, validation; all under "all" if no name tells one.

    Args:
        title: The data set, for errors.
        names: The files, relative, with "/".
        one_set: Raise an error if folders seem to hold several data sets, such as configurations of one on the hub.

    Raises:
        DataError: A name tells two splits, only some names tell one, or there are no training files among splits.
    """
    splits: dict[str, list[str]] = {}
    sets: dict[str, str] = {}
    for name in names:
        split, folder = _split_of(title, name)
        splits.setdefault(split, []).append(name)
        sets.setdefault(folder, name)
    if one_set and len(sets) > 1:
        found = first_few([folder or "." for folder in sorted(sets)])
        raise DataError(
            f"{title} holds several data sets, in the folders {found}. Set prepare_data.path to one of them, or to a "
            "pattern of files."
        )
    told = [split for split in splits if split != "all"]
    if told and "all" in splits:
        raise DataError(
            f"{title} holds files of splits ({splits[told[0]][0]}) beside files whose names tell no split "
            f"({first_few(splits['all'], 3)}). Set prepare_data.path to a pattern of the files to read."
        )
    if told and "train" not in splits:
        raise DataError(
            f"{title} holds {' and '.join(sorted(told))} files ({splits[told[0]][0]}), but no training files. Add "
            "files with train in their names."
        )
    return splits


def _split_of(title: str, name: str) -> tuple[str, str]:
    """Return the split of a file, and its folder without parts that name splits."""
    parts = PurePosixPath(canonical(name)).parts
    split: str | None = None
    rest: list[str] = []
    for part in reversed(parts):
        words = re.findall("[a-z]+", part.casefold().rpartition(".")[0] if part == parts[-1] else part.casefold())
        found = {SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD}
        if len(found) > 1 and split is None:
            raise DataError(f"{title}: the name {name} tells several splits ({some(found)}). Rename the file.")
        if found and split is None:
            split = found.pop()
        elif not found and part != parts[-1]:
            rest.insert(0, part)
    return split or "all", "/".join(rest)


def _matching(path: Path) -> tuple[Path, list[str]]:
    found: list[str] = []
    folder, written = _below_existing(path)
    for pattern in expanded(written):
        if is_pattern(pattern):
            files = sorted(glob.glob(os.path.join(glob.escape(str(folder)), pattern), recursive=True))
        elif system_errors.status(folder / pattern) is None:
            raise DataError(f"{folder / pattern} does not exist. Get it, or change prepare_data.path, which names it.")
        else:
            files = [str(folder / pattern)]
        found += [file for file in files if os.path.isfile(file)]
    if not found:
        raise DataError(f"No file matches {path}. Correct prepare_data.path.")
    root = Path(os.path.commonpath([os.path.dirname(file) for file in found]))
    return root, _ordered(Path(file).relative_to(root).as_posix() for file in set(found))


def _below_existing(path: Path) -> tuple[Path, str]:
    """Return the nearest folder above a path that exists, and the rest of the path."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    return folder, str(path.relative_to(folder))


def _below(folder: Path, endings: tuple[str, ...]) -> list[str]:
    files = (Path(entry.path) for entry in files_below(folder) if entry.name.lower().endswith(endings))
    return _ordered(file.relative_to(folder).as_posix() for file in files)


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (canonical(name), name))


def _refuse_pointer(file: Path) -> None:
    with system_errors.reading(file), file.open("rb") as stream:
        start = stream.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise DataError(f"{file} is a git-lfs pointer, not the data. Run `git lfs pull` in its repository.")
