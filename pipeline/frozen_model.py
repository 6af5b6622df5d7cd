"""The frozen model as its manifest names it: what every stage that runs it checks first."""

import json
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
    for name, sha256 in backbone["files"].items():
        part = config.backbone_dir / name
        if not part.exists() or provenance.file_sha256(part) != sha256:
            problem = "differs from" if part.exists() else "is missing but named in"
            raise PipelineError(f"{part} {problem} {config.backbone_manifest}: run `pipeline prepare-backbone`")
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{file} cannot be read ({error!r}): run `pipeline prepare-backbone`") from None
