"""Names of files and folders as every system sees them, and the ones that systems leave behind.

File systems write an accent in two ways (NFC: one character, NFD: letter and accent). Names are compared and sorted by
their NFC form, so that one tree gives one order of classes and images everywhere.
"""

import os
import re
import unicodedata

from pipeline.errors import PipelineError

_LEFTOVERS = frozenset(
    {
        "__macosx", "__pycache__", "icon\r", "network trash folder", "temporary items", "resource.frk",  # macOS, Python
        "thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin",
        "recycler", "system volume information", "found.000",  # Windows
        "@eadir", "@tmp", "@sharesnap", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found",  # NAS
    }
)  # fmt: skip


def is_leftover(name: str) -> bool:
    """Whether systems and programs leave such a file or folder: hidden names, thumbnails, wastebaskets, caches."""
    return name.startswith((".", "~$")) or name.casefold() in _LEFTOVERS


def canonical(name: str) -> str:
    """A name in NFC, from its bytes on disk, whatever the language of this session; other bytes stay escaped."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "surrogateescape"))


def readable(folder_name: str) -> str:
    """A folder's name in NFC.

    Raises:
        PipelineError: its bytes are not UTF-8.
    """
    name = canonical(folder_name)
    if name.isascii() or not any("\ud800" <= one <= "\udfff" for one in name):
        return name
    raise PipelineError(f"the folder {os.fsencode(folder_name)!r} has no UTF-8 name. Rename it.")


def ending(name: str) -> str:
    """What a file name ends in, in lower case with its dot: ".heic"; "no ending", or "other endings" if it is odd."""
    last = os.path.splitext(name)[1].lower()
    if not last:
        return "no ending"
    return last if re.fullmatch(r"\.[a-z0-9]{1,8}", last) else "other endings"


def some(names: list[str] | set[str], count: int = 5) -> str:
    """The first names in order, and how many more there are."""
    first, more = sorted(names, key=canonical)[:count], len(names) - count
    return ", ".join(map(canonical, first)) + (f" and {more} more" if more > 0 else "")
