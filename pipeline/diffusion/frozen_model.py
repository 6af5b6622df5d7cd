"""The frozen model as its manifest names it, and the image encoder beside it: what every stage checks by hash."""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import provenance
from pipeline.errors import PipelineError
from pipeline.io import system_errors
from pipeline.settings.config import Config

_VARIANT = re.compile(r"\.(fp16|bf16|non_ema)[.-]")
"""In the names of other precisions and training states of the same weights, which are not loaded."""


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
            raise PipelineError(
                f"{part} is missing but named in {file}. Run `pipeline prepare-backbone`: neither git nor DVC keeps "
                "weights"
            ) from None
        except OSError as error:
            raise system_errors.refusal(error, part) or PipelineError(
                f"{part} cannot be read ({error.strerror}). Run `pipeline prepare-backbone`"
            ) from None
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
        with system_errors.reading(file):
            backbone = json.loads(file.read_text(encoding="utf-8"))
        return {**backbone, "files": {name: str(sha256) for name, sha256 in backbone["files"].items()}}
    except FileNotFoundError:
        raise PipelineError(f"{file} is missing: run `pipeline prepare-backbone`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PipelineError(f"{file} cannot be read ({error!r}): run `pipeline prepare-backbone`") from None


def image_encoder_dir(config: Config) -> Path | None:
    """The folder of the image encoder; None without image conditioning."""
    path = config.params.extract_features.image_conditioning
    return config.path(path) if path else None


def image_encoder_hashes(config: Config) -> dict[str, str] | None:
    """SHA-256 of each file that decides the image encoder's embedding; None without image conditioning.

    Raises:
        PipelineError: the directory has no safetensors weights.
    """
    path = image_encoder_dir(config)
    if path is None:
        return None
    present = system_errors.entries(path)
    weights = [file for file in present if file.suffix == ".safetensors" and not _VARIANT.search(file.name)]
    files = [file for file in present if file.name == "config.json"] + weights
    if not weights:
        raise PipelineError(
            f"extract_features.image_conditioning: {path} has no .safetensors weights in full precision. Name the "
            "directory of a CLIPVisionModelWithProjection that has them"
        )
    return {file.name: provenance.file_sha256(file) for file in files}


def is_inside(name: str) -> bool:
    """Whether a path, "/" between its parts, stays inside the folder that it is relative to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name
