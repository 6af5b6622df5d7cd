"""A small file in results/.sweep for each run of the sweep, on which DVC's report stage depends.

results/ also holds runs that are no longer in the sweep or were made by hand, so the report cannot depend on all of it,
and DVC cannot list the runs of a matrix as dependencies. Every run of the sweep therefore writes the SHA-256 of its
SHA256SUMS to results/.sweep/<run>.sha256, and the report removes the files of other runs before DVC records the folder.
"""

from collections.abc import Iterable
from pathlib import Path

from pipeline import provenance
from pipeline.errors import DataError
from pipeline.io import atomic


def record(digests: Path, run: Path) -> None:
    """Write the file of the finished run in folder `run` to the folder `digests`."""
    digests.mkdir(parents=True, exist_ok=True)
    atomic.write_text(_file(digests, run), f"{provenance.file_sha256(run / provenance.CHECKSUMS)}\n")


def check(digests: Path, run: Path) -> None:
    """Check that a run is the one that its file was written for; a run may have no file.

    Raise DataError if it is another run, FileNotFoundError if it has no checksums.
    """
    file, found = _file(digests, run), provenance.file_sha256(run / provenance.CHECKSUMS)
    if file.exists() and file.read_text(encoding="utf-8", errors="replace").strip() != found:
        raise DataError(
            f"{run} is not the run that {file} was written for (checksums differ). Train it again or `dvc checkout` "
            "both, or delete that file to accept the run unchanged."
        )


def complete(digests: Path, runs: Iterable[Path]) -> None:
    """Write the missing files of these finished runs, and remove those of all others."""
    wanted = {_file(digests, run): run for run in runs}
    for other in set(digests.glob("*.sha256")) - wanted.keys():
        atomic.remove(other)
    for file, run in wanted.items():
        if not file.exists():
            record(digests, run)


def _file(digests: Path, run: Path) -> Path:
    return digests / f"{run.name}.sha256"
