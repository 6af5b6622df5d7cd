"""A model in a directory of this machine, in diffusers format."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline import provenance
from pipeline.errors import DataError
from pipeline.io import system_errors
from pipeline.io.system_errors import entries

_LFS_POINTER = b"version https://git-lfs"


class Directory:
    """A diffusers pipeline directory, as `selection.Source` describes it."""

    def __init__(self, path: Path, target: Path | None = None) -> None:
        """List the files of the directory and of the folders in it.

        Raise DataError if it cannot be read, or its files are in `target`, the folder that will be replaced by links.
        """
        self.path = path.absolute()
        self.title, self.listed = str(path), True
        try:
            top = entries(self.path)
            inner = [file for folder in top if folder.is_dir() for file in entries(folder)]
            files = [file for file in [*top, *inner] if file.is_file()]
            self.sizes = {file.relative_to(self.path).as_posix(): file.stat().st_size for file in files}
        except OSError as error:
            problem = f"{path} cannot be read ({error.strerror})"
            raise system_errors.refusal(error, path) or DataError(f"{problem}. Check the path.") from None
        if target is None or target.is_symlink():
            return
        if any(file.resolve().is_relative_to(target.resolve()) for file in files):
            raise DataError(
                f"prepare_backbone.source = {path} is in {target}, which would be replaced. Move the model to another "
                "folder, or set another prepare_backbone.name."
            )

    def read(self, name: str) -> Path:
        """Return a file's path."""
        return self.path / name

    def fetch(self, names: Sequence[str]) -> dict[str, tuple[Path, str]]:
        """Return each file's absolute path, links followed, and its SHA-256.

        Raise DataError if a file cannot be read, or is not a complete safetensors file by its header and length.
        """
        paths = {name: (self.path / name).resolve() for name in names}
        for path in paths.values():
            if path.suffix == ".safetensors":
                _check_header(path)
        return {name: (path, _sha256(path)) for name, path in paths.items()}


def _check_header(path: Path) -> None:
    with system_errors.reading(path):
        start = path.read_bytes()[: len(_LFS_POINTER)] if path.stat().st_size < 1024 else b""
    if start == _LFS_POINTER:
        raise DataError(f"{path} is a git-lfs pointer, not the weights. Run `git lfs pull` in its repository.")
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise system_errors.refusal(error, path) or DataError(
            f"{path} is not a complete safetensors file ({error}). Get it again."
        ) from None


def _sha256(path: Path) -> str:
    try:
        return provenance.file_sha256(path)
    except OSError as error:
        problem = f"{path} cannot be read ({error.strerror})"
        raise system_errors.refusal(error, path) or DataError(f"{problem}. Get the complete model.") from None
