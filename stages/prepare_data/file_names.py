"""Names of files and folders as every system sees them, and the ones that systems leave behind.

File systems write an accent in two ways (NFC: one character, NFD: letter and accent). Names are compared and sorted by
their NFC form, so that one tree gives one order of classes and images everywhere.
"""

import os
import re
import unicodedata
from collections.abc import Iterable

from pipeline.errors import DataError
from pipeline.text import first_few

_LEFTOVERS = frozenset(
    {
        "__macosx", "__pycache__", "icon\r", "network trash folder", "temporary items", "resource.frk",  # macOS, Python
        "thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin",
        "recycler", "system volume information", "found.000",  # Windows
        "@eadir", "@tmp", "@sharesnap", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot",  # NAS
        "lost+found",
    }
)  # fmt: skip


def is_leftover(name: str) -> bool:
    """Return whether a name is hidden, or one that systems and programs leave: thumbnails, wastebaskets, caches."""
    return name.startswith((".", "~$")) or name.casefold() in _LEFTOVERS


def canonical(name: str) -> str:
    """A name as the system lists it -> NFC, from its bytes on disk, whatever the language of this session.

    Bytes that are not UTF-8 stay escaped. The result is text for people: it opens no file.
    """
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "surrogateescape"))


def utf8(name: str) -> str:
    """The canonical name of a folder that names a class or a domain, unchanged.

    Raises:
        DataError: Its bytes are not UTF-8.
    """
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        raise DataError(f"the folder {name.encode(errors='surrogateescape')!r} has no UTF-8 name: rename it") from None


def ending(name: str) -> str:
    """What a file name ends in, in lower case with its dot: ".heic"; "no ending", or "other endings" if it is odd."""
    last = os.path.splitext(name)[1].lower()
    if not last:
        return "no ending"
    return last if re.fullmatch(r"\.[a-z0-9]{1,8}", last) else "other endings"


def some(names: Iterable[str], count: int = 5) -> str:
    """The first names in order, and how many more there are."""
    return first_few(sorted(names), count)


def some_folders(names: Iterable[str]) -> str:
    """`some` for names as the system lists them."""
    return some(map(canonical, names))
