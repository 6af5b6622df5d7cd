"""Tell compressed files by how they start."""

import re

_STARTS = {rb"\x1f\x8b": "gzip", rb"BZh\d1AY&SY": "bzip2", rb"\xfd7zXZ\0": "xz", rb"\(\xb5/\xfd": "zstd"}
"""Regular expressions: "BZh" alone may be the name of a folder in a tar."""

LENGTH = 10
"""How many bytes tell it."""


def compression_of(start: bytes) -> str | None:
    """Return the name of the compression of a file that starts with these bytes, or None."""
    return next((name for magic, name in _STARTS.items() if re.match(magic, start)), None)
