"""Text for a terminal. Text written by others must not move the cursor, change colours or forge a line."""

from collections.abc import Sequence

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def printable(text: str) -> str:
    """Return the text on one line, with Python's escape for every invisible character (control, direction, newline)."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def size(count: float) -> str:
    """Return a number of bytes in three digits: 512 B, 1.23 MB."""
    for unit in _UNITS[:-1]:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {_UNITS[-1]}"


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and how many more there are: a, b and 3 more."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
