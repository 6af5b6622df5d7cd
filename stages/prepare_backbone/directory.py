"""A model in a directory of this machine, in diffusers format."""

from collections.abc import Sequence
from pathlib import Path

from pipeline import provenance, system_errors
from pipeline.errors import PipelineError


class Directory:
    """A diffusers pipeline directory, as `selection.Source` describes it."""

    def __init__(self, path: Path) -> None:
        """Lists the files of the directory and of the folders in it.

        Raises:
            PipelineError: it cannot be read.
        """
        self.path = path.absolute()
        self.title = str(path)
        try:
            files = [file for pattern in ("*", "*/*") for file in sorted(self.path.glob(pattern)) if file.is_file()]
            self.sizes = {file.relative_to(self.path).as_posix(): file.stat().st_size for file in files}
        except OSError as error:
            raise system_errors.refusal(error, path) or PipelineError(f"{path} cannot be read ({error})") from None

    def read(self, name: str) -> Path:
        """A file's path."""
        return self.path / name

    def fetch(self, names: Sequence[str]) -> dict[str, tuple[Path, str]]:
        """Each file's absolute path and SHA-256, 64 hexadecimal digits.

        Raises:
            PipelineError: a file cannot be read.
        """
        return {name: (self.path / name, _sha256(self.path / name)) for name in names}


def _sha256(path: Path) -> str:
    try:
        return provenance.file_sha256(path)
    except OSError as error:
        raise system_errors.refusal(error, path) or PipelineError(f"{path} cannot be read ({error.strerror})") from None
