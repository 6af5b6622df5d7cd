"""The labels of a data set in large files, as numbers or names, and the names of its classes."""

from array import array
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.data.image_folder import class_name
from pipeline.errors import DataError
from pipeline.io import system_errors
from pipeline.text import printable

_LARGEST = 2**63 - 1  # number that an array of labels holds
_MOST_CLASSES = 32_767
"""The largest number of classes: a feature set numbers their prompts in 16 bits."""


class Labels:
    """The labels of a split, in the order of its images; a missing one counts as -1."""

    def __init__(self, title: str) -> None:
        """Start without labels; errors name the data set by its `title`."""
        self.title = title
        self.names: dict[str, int] = {}  # of labels that are names, in the order of their first image
        self.missing = 0
        self.first_missing = ""
        self._numbers = array("q")
        self.counted = False  # whether some label is a number

    def __len__(self) -> int:
        """Number of images."""
        return len(self._numbers)

    @property
    def numbers(self) -> np.ndarray:
        """The labels, int64 (N,); those that are names count these in the order of `names`."""
        return np.frombuffer(self._numbers, np.int64) if self._numbers else np.empty(0, np.int64)

    def add(self, label: int | str | None, where: str) -> None:
        """Add the label of the image at `where`, which is missing if it is None or negative."""
        if isinstance(label, str):
            if label not in self.names and len(self.names) == _MOST_CLASSES:
                problem = f"{self.title} has more than {_MOST_CLASSES:,} different labels, such as {label[:60]!r}"
                raise DataError(f"{printable(problem)}. Set prepare_data.label_column to the one of the classes.")
            label = self.names.setdefault(label, len(self.names))
        elif label is None or label < 0:
            label = -1
            self.first_missing = self.first_missing or where
            self.missing += 1
        else:
            self.counted = True
            if label > _LARGEST:
                problem = f"{self.title} has the label {str(label)[:60]}, which is too large for a class ({where})"
                raise DataError(f"{printable(problem)}. Correct the labels.")
        if self.names and self.counted:
            raise _mixed(self.title, where)
        self._numbers.append(label)


def resolve(
    title: str, splits: Mapping[str, Labels], known: list[str] | None, texts: Mapping[int, str]
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the class names, and the labels of each split, int64 (N,), as positions in them.

    Args:
        title: The data set, for errors.
        splits: The labels that were found.
        known: The class names, if a file or the data set's description has them; else, labels that are names are
            sorted, and numbers are named by `texts`, or "class 7".
        texts: Names of classes by number.

    Raises:
        DataError: A label is missing, or beyond the known names, or one split has names and the other numbers.
    """
    for labels in splits.values():
        if labels.missing:
            number = f"{labels.missing} images have" if labels.missing > 1 else "an image has"
            raise DataError(f"{title}: {number} no label, such as {labels.first_missing}. Add it, or leave them out.")
    if any(labels.names for labels in splits.values()):
        if counted := [split for split, labels in splits.items() if labels.counted]:
            raise _mixed(title, f"those of the {counted[0]} files are numbers")
        found = sorted({name for labels in splits.values() for name in labels.names})
        position = {name: number for number, name in enumerate(known or found)}
        if foreign := [name for name in found if name not in position]:
            problem = f"{title} has the label {foreign[0][:60]!r}, which is not among the {len(position)} class names"
            raise DataError(f"{printable(problem)}. Correct the labels or the names.")
        codes = {
            split: np.array([position[name] for name in labels.names], np.int64) for split, labels in splits.items()
        }
        return _spaced(known or found), {split: codes[split][labels.numbers] for split, labels in splits.items()}
    largest = max((int(labels.numbers.max()) for labels in splits.values() if len(labels)), default=-1)
    if largest >= (len(known) if known else _MOST_CLASSES):
        beyond = f"beyond the {len(known)} class names" if known else "too large for a class"
        raise DataError(f"{title} has the label {largest}, which is {beyond}. Correct the labels or the names.")
    numbered = [texts.get(number, f"class {number}") for number in range(largest + 1)]
    return _spaced(known or numbered), {split: labels.numbers for split, labels in splits.items()}


def read_names(folders: list[Path]) -> list[str] | None:
    """Return the lines of classnames.txt, which the first of these folders has that has one; None without."""
    for folder in folders:
        file = folder / "classnames.txt"
        if system_errors.status(file) is None:
            continue
        try:
            with system_errors.reading(file):
                lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read ({error}). Write a class name per line, in UTF-8.") from None
        while lines and not lines[-1]:
            lines.pop()
        if not lines or not all(lines):
            raise DataError(f"{file} has an empty line. Write a class name per line, in the order of the labels.")
        return lines
    return None


def _mixed(title: str, where: str) -> DataError:
    problem = printable(f"{title} has labels that are numbers and labels that are names ({where})")
    return DataError(f"{problem}. Use one of them for all images.")


def _spaced(names: list[str]) -> list[str]:
    return [class_name(name) for name in names]
