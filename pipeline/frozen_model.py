"""The frozen model as its manifest names it: what every stage that runs it checks first."""

import json
from pathlib import PurePosixPath
from typing import Any

from pipeline import provenance
from pipeline.config import Config
from pipeline.errors import PipelineError


def read_checked(config: Config) -> dict[str, Any]:
    """The backbone's manifest: its name, source, revision, and "files", path -> SHA-256.

    Raises:
        PipelineError: it is missing or unreadable, or a file of the model is not the one it names.
    """
    file = config.backbone_manifest
    try:
        backbone = json.loads(file.read_text(encoding="utf-8"))
        hashes: dict[str, str] = {name: str(sha256) for name, sha256 in backbone["files"].items()}
    except FileNotFoundError:
        raise PipelineError(f"{file} is missing: run `pipeline prepare-backbone`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PipelineError(f"{file} cannot be read ({error!r}): run `pipeline prepare-backbone`") from None
    for name, sha256 in hashes.items():
        if not is_inside(name):
            raise PipelineError(f"{file} names {name!r}, outside the model: run `pipeline prepare-backbone`")
        part = config.backbone_dir / name
        try:
            whole = provenance.file_sha256(part) == sha256
        except OSError as error:
            problem = (
                "is missing but" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror}) but"
            )
            raise PipelineError(f"{part} {problem} named in {file}: run `pipeline prepare-backbone`") from None
        if not whole:
            raise PipelineError(f"{part} differs from {file}: run `pipeline prepare-backbone`")
    return backbone


def is_inside(name: str) -> bool:
    """Whether a path, "/" between its parts, stays inside the folder that it is relative to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name
