"""The runs of the sweep, each with a small file in results/.sweep: what DVC's report stage depends on.

results/ also holds runs that left the sweep or were made by hand, so the report cannot depend on the whole folder, and
DVC cannot list the runs of a matrix as dependencies. Every run of the sweep therefore writes the SHA-256 of its
SHA256SUMS to results/.sweep/<run>.sha256, and the report removes the files of other runs before DVC records the folder.
"""

from pathlib import Path

from pipeline import provenance
from pipeline.errors import PipelineError
from pipeline.io import atomic
from pipeline.settings.config import Config

_SUFFIX = ".sha256"


def record(config: Config, run: Path) -> None:
    """Writes the file of a finished run; a run that the sweep in params.yaml does not name gets none.

    Args:
        config: the project's configuration.
        run: the run's folder, with its checksums.

    Raises:
        PipelineError: it cannot be written.
    """
    if config.sweep_is_as_written and run in config.runs_of_sweep:
        config.sweep_dir.mkdir(parents=True, exist_ok=True)
        atomic.write_text(_file(config, run), f"{provenance.file_sha256(run / provenance.CHECKSUMS)}\n")


def check(config: Config, run: Path) -> None:
    """Checks that a run is the one that its file was written for; a run may have no file.

    Raises:
        PipelineError: it is another.
        FileNotFoundError: the run has no checksums.
    """
    file, found = _file(config, run), provenance.file_sha256(run / provenance.CHECKSUMS)
    if file.exists() and file.read_text(encoding="utf-8", errors="replace").strip() != found:
        raise PipelineError(
            f"{run} is not the run that {file} was written for: train it again or `dvc checkout` both, or delete that "
            "file to take the run as it is"
        )


def complete(config: Config) -> None:
    """Leaves in results/.sweep the runs of the sweep and no others; all of them must be finished.

    A sweep that was given on the command line is not the one that DVC knows: nothing is changed for it.

    Raises:
        PipelineError: a file cannot be written.
    """
    if not config.sweep_is_as_written:
        return
    wanted = {_file(config, run): run for run in config.runs_of_sweep}
    for present in config.sweep_dir.glob(f"*{_SUFFIX}"):
        if present not in wanted:
            atomic.remove(present)
    for file, run in wanted.items():
        if not file.exists():
            record(config, run)


def _file(config: Config, run: Path) -> Path:
    return config.sweep_dir / f"{run.name}{_SUFFIX}"
