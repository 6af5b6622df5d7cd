"""Names of files and folders that are the same on every system, and the leftovers of systems and programs.

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
    """Return whether a name is hidden, or a leftover of a system or program: thumbnails, trash folders, caches."""
    return name.startswith((".", "~$")) or name.casefold() in _LEFTOVERS


def canonical(name: str) -> str:
    """Return a name in NFC, from its bytes on disk and in any locale; for display, not to open the file.

    Bytes that are not UTF-8 stay escaped.
    """
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "surrogateescape"))


def utf8(name: str) -> str:
    """Return a folder's canonical name unchanged, or raise DataError if its bytes are not UTF-8."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        written = name.encode(errors="surrogateescape")
        raise DataError(f"A folder's name is not UTF-8 ({written!r}). Rename the folder.") from None


def ending(name: str) -> str:
    """Return a file's extension in lower case, such as ".heic"; "no ending", or "other endings" if it is unusual."""
    last = os.path.splitext(name)[1].lower() or "no ending"
    return last if re.fullmatch(r"\.[a-z0-9]{1,8}|no ending", last) else "other endings"


def some(names: Iterable[str], count: int = 5) -> str:
    """Return the first names in order, and how many more there are."""
    return first_few(sorted(names), count)


def some_folders(names: Iterable[str]) -> str:
    """Apply `some` to names as the system lists them."""
    return some(map(canonical, names))
