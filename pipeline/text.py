"""Text for a terminal, where what others wrote must not move the cursor, recolour the screen or forge a line."""

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def printable(text: str) -> str:
    """The text on one line: every character that is not seen (control, direction, newline) as Python's escape of it."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def size(count: float) -> str:
    """Bytes in three digits: 512 B, 1.23 MB."""
    for unit in _UNITS[:-1]:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {_UNITS[-1]}"
