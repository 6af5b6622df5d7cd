"""A small file in results/.sweep for each method and partition of the sweep, on which DVC's report stage depends.

results/ also holds runs that are no longer in the sweep or were made by hand, so the report cannot depend on all of it,
and DVC cannot list the stages of a matrix as dependencies. Every run of the sweep therefore has a line in
results/.sweep/<method>-<partition>.sha256, as sha256sum writes it: the SHA-256 of its SHA256SUMS, and the name of
its folder, s<seed>. The report removes the lines and files of other runs before DVC records the folder.
"""

from collections.abc import Iterable
from pathlib import Path

from pipeline import provenance
from pipeline.errors import DataError
from pipeline.io import atomic
from pipeline.io.system_errors import reading


def record(digests: Path, run: Path) -> None:
    """Write the line of the finished run in folder `run` to its file in the folder `digests`.

    The caller sees to it that no other process writes the lines of the same method and partition.
    """
    file = _file(digests, run)
    others = {name: digest for name, digest in _read(file).items() if name}  # but for a damaged line
    _write(file, others | {run.name: _digest(run)})


def check(digests: Path, run: Path) -> None:
    """Check that a run is the one that its line was written for; a run may have no line.

    Raise DataError if it is another run, FileNotFoundError if it has no checksums.
    """
    file, found = _file(digests, run), _digest(run)
    lines = _read(file)
    if file.exists() and not (lines and all(lines)):  # all(): a line that was cut off has no name
        raise DataError(
            f"{file} is damaged. `dvc checkout` it, or delete it to accept the runs in {run.parent} as they are."
        )
    if lines.get(run.name, found) != found:
        raise DataError(
            f"{run} is not the run that {file} was written for (checksums differ). Train it again, `dvc checkout` "
            f"both, or delete the line of {run.name} to accept the run unchanged."
        )


def complete(digests: Path, runs: Iterable[Path]) -> None:
    """Write the missing lines of these finished runs, and remove those of all others."""
    wanted: dict[Path, list[Path]] = {}
    for run in runs:
        wanted.setdefault(_file(digests, run), []).append(run)
    for other in set(digests.glob("*.sha256")) - wanted.keys():
        atomic.remove(other)
    for file, group in wanted.items():
        present = _read(file)
        lines = {run.name: present.get(run.name) or _digest(run) for run in group}
        if lines != present:
            _write(file, lines)


def _file(digests: Path, run: Path) -> Path:
    return digests / f"{run.parent.name}.sha256"


def _digest(run: Path) -> str:
    return provenance.file_sha256(run / provenance.CHECKSUMS)


def _read(file: Path) -> dict[str, str]:
    """Return folder -> digest; empty if the file does not exist."""
    if not file.exists():
        return {}
    with reading(file):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _write(file: Path, lines: dict[str, str]) -> None:
    """Write the lines in the order of seeds, so that the order of training does not matter."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(lines, key=lambda name: (len(name), name))
    atomic.write_text(file, "".join(f"{lines[name]}  {name}\n" for name in names))
