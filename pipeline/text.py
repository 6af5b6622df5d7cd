"""Text for a terminal: untrusted text must not move the cursor, change colours or fake a line."""

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
