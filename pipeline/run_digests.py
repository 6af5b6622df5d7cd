"""A small file in results/.sweep for each run of the sweep, on which DVC's report stage depends.

results/ also holds runs that are no longer in the sweep or were made by hand, so the report cannot depend on all of it,
and DVC cannot list the runs of a matrix as dependencies. Every run of the sweep therefore writes the SHA-256 of its
SHA256SUMS to results/.sweep/<run>.sha256, and the report removes the files of other runs before DVC records the folder.
"""

from pathlib import Path

from pipeline import provenance
from pipeline.errors import DataError
from pipeline.io import atomic
from pipeline.settings.config import Config

_SUFFIX = ".sha256"


def record(config: Config, run: Path) -> None:
    """Write the file of a finished run; nothing for a run outside the sweep in params.yaml.

    Args:
        config: The project's configuration.
        run: The run's folder, with its checksums.

    Raises:
        PipelineError: It cannot be written.
    """
    if config.sweep_is_as_written and run in config.runs_of_sweep:
        config.sweep_dir.mkdir(parents=True, exist_ok=True)
        atomic.write_text(_file(config, run), f"{provenance.file_sha256(run / provenance.CHECKSUMS)}\n")


def check(config: Config, run: Path) -> None:
    """Check that a run is the one that its file was written for; a run may have no file.

    Raises:
        DataError: It is another run.
        FileNotFoundError: The run has no checksums.
    """
    file, found = _file(config, run), provenance.file_sha256(run / provenance.CHECKSUMS)
    if file.exists() and file.read_text(encoding="utf-8", errors="replace").strip() != found:
        raise DataError(
            f"{run} is not the run that {file} was written for (checksums differ). Train it again or `dvc checkout` "
            "both, or delete that file to accept the run as it is."
        )


def complete(config: Config) -> None:
    """Write the missing files of the sweep's runs, which must be finished, and remove those of other runs.

    DVC does not know a sweep given on the command line, so nothing is changed for it.

    Raises:
        PipelineError: A file cannot be written.
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
