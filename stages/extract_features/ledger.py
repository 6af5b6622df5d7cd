"""What extraction has cost on this machine: .pipeline/passes.csv, a line for each file of a set that was computed here.

    set,fingerprint,file,passes

A pass is one image with one prompt through the denoiser. Passes are counted as they are computed, so a set that was
received or found complete has no line, and a killed and resumed extraction has each shard once; the work on a shard
that was lost with its process is not in it. The set's own manifest cannot say this: it is the same whoever made which
shard, and after how many attempts.
"""

import os
from pathlib import Path

_HEADER = "set,fingerprint,file,passes\n"


class Ledger:
    """The lines of one set."""

    def __init__(self, folder: Path, set_name: str, fingerprint: str) -> None:
        """Enters into passes.csv in `folder`."""
        self._file = folder / "passes.csv"
        self._of_set = f"{set_name},{fingerprint}"

    def enter(self, file: str, passes: int) -> None:
        """Adds a line, in one write: lines of processes side by side do not mix."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            header = "" if os.fstat(new).st_size else _HEADER
            os.write(new, f"{header}{self._of_set},{file},{passes}\n".encode())
        finally:
            os.close(new)
