"""Text for a terminal: untrusted text must not move the cursor, change colours or fake a line."""

from collections.abc import Sequence

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def printable(text: str) -> str:
    """Return the text on one line, with invisible characters (control, direction, newline) escaped as in Python."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def size(count: float) -> str:
    """Format a number of bytes with three digits: 512 B, 1.23 MB."""
    for unit in _UNITS[:-1]:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {_UNITS[-1]}"


def duration(seconds: float) -> str:
    """Format a time in seconds, minutes or hours: 45 s, 2.5 min, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.{1 if minutes < 10 else 0}f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and how many more there are: a, b and 3 more."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
