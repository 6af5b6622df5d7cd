"""The frozen model as its manifest names it: what every stage that runs it checks first."""

import json
from pathlib import PurePosixPath
from typing import Any

from pipeline import provenance
from pipeline.config import Config
from pipeline.errors import PipelineError


def read_checked(config: Config) -> dict[str, Any]:
    """The backbone's manifest, its files checked.

    Raises:
        PipelineError: it is missing or unreadable, or a file of the model is not the one it names.
    """
    backbone = read_manifest(config)
    file = config.backbone_manifest
    for name, sha256 in backbone["files"].items():
        if not is_inside(name):
            raise PipelineError(f"{file} names {name!r}, outside the model: run `pipeline prepare-backbone`")
        part = config.backbone_dir / name
        try:
            whole = provenance.file_sha256(part) == sha256
        except FileNotFoundError:
            raise PipelineError(f"{part} is missing but named in {file}: run `pipeline prepare-backbone`") from None
        except OSError as error:
            raise PipelineError(f"{part} cannot be read ({error.strerror}): run `pipeline prepare-backbone`") from None
        if not whole:
            raise PipelineError(f"{part} differs from {file}: run `pipeline prepare-backbone`")
    return backbone


def read_manifest(config: Config) -> dict[str, Any]:
    """The backbone's manifest: its name, source, revision, and "files", path -> SHA-256.

    Raises:
        PipelineError: it is missing or unreadable.
    """
    file = config.backbone_manifest
    try:
        backbone = json.loads(file.read_text(encoding="utf-8"))
        return {**backbone, "files": {name: str(sha256) for name, sha256 in backbone["files"].items()}}
    except FileNotFoundError:
        raise PipelineError(f"{file} is missing: run `pipeline prepare-backbone`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PipelineError(f"{file} cannot be read ({error!r}): run `pipeline prepare-backbone`") from None


def is_inside(name: str) -> bool:
    """Whether a path, "/" between its parts, stays inside the folder that it is relative to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name
