"""The frozen model's manifest, which DVC tracks instead of the weights, and checks of the files that it names."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, JsonValue, StringConstraints, ValidationError

from pipeline import provenance
from pipeline.errors import DataError
from pipeline.io import system_errors
from pipeline.text import printable

_PREPARE = "Run `pipeline prepare-backbone`"
_LONGEST_REASON = 200  # characters of a validation error that are shown
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema)[.-]")
"""Other precisions or training states of the same weights, which are not loaded, have this in their names."""


TRAINING = "guide_training.json"
"""The file in a model's folder that says what it was trained on, if `prepare-backbone` trained it."""


class TrainingRecord(BaseModel):
    """What a backbone was trained on and how: the content of its `TRAINING` file.

    Attributes:
        corpus: Name of the folder of images.
        corpus_sha256: Hash of the images' pixels and files, their classes and the class names.
        images: Number of images per class name.
        settings: prepare_backbone.training.
        losses: The last losses of the autoencoder and the denoiser.
        hashes: "files" and "pixels": those of every image, as `pipeline.data.image_hashes` makes them, sorted.
        weights: File in the model's folder -> SHA-256.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    corpus: str
    corpus_sha256: str
    images: dict[str, int]
    settings: dict[str, JsonValue]
    losses: dict[str, float]
    hashes: dict[str, list[Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]]]
    weights: dict[str, str]


def read_training(file: Path) -> TrainingRecord:
    """Read a `TRAINING` file; raise DataError if it is missing or damaged, SystemRefusal if unreadable."""
    try:
        with system_errors.reading(file):
            return TrainingRecord.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{file} does not say what the model was trained on ({_reason(error)}). Get the complete model."
        ) from None


class BackboneManifest(BaseModel):
    """The content of data/backbones/<name>.json."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: str  # prepare_backbone.name
    source: str  # "embedded", a model on the hub, or the name of a local folder
    revision: str | None = None  # commit on the hub
    variant: str | None = None  # "fp16" if 16-bit weights were taken
    files: dict[str, str]  # path inside the model's folder -> SHA-256, of every file that determines the features
    training: TrainingRecord | None = None  # of a model that `prepare-backbone` trained

    def origin(self) -> dict[str, str | None]:
        """Return name, source and revision, which outputs record about their frozen model."""
        return self.model_dump(include={"name", "source", "revision"})


def read_manifest(file: Path) -> BackboneManifest:
    """Read the manifest of a frozen model; raise DataError if it is missing or damaged, SystemRefusal if unreadable."""
    try:
        with system_errors.reading(file):
            return BackboneManifest.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{file} is missing. {_PREPARE}.") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}). {_PREPARE}.") from None
    except ValidationError as error:
        raise DataError(f"{file} is not the manifest of a frozen model ({_reason(error)}). {_PREPARE}.") from None


def read_checked(file: Path, folder: Path) -> BackboneManifest:
    """Read the manifest and check the files in the model's folder against it; raise DataError if one differs."""
    manifest = read_manifest(file)
    for name, sha256 in manifest.files.items():
        if not _is_inside(name):
            raise DataError(f"{file} names {name!r}, which is outside the model's folder. {_PREPARE}.")
        part = folder / name
        try:
            intact = provenance.file_sha256(part) == sha256
        except FileNotFoundError:
            raise DataError(
                f"{part} is missing but named in {file}. {_PREPARE}: weights are tracked neither by git nor by DVC."
            ) from None
        except OSError as error:
            raise DataError(f"{part} cannot be read ({error.strerror}). {_PREPARE}.") from None
        if not intact:
            raise DataError(f"{part} differs from {file}. {_PREPARE}.")
    return manifest


def image_encoder_hashes(folder: Path | None) -> dict[str, str] | None:
    """Return the SHA-256 of each file that determines the image encoder's embeddings; None without an encoder.

    Raise DataError if the folder has no safetensors weights.
    """
    if folder is None:
        return None
    present = system_errors.entries(folder)
    weights = [file for file in present if file.suffix == ".safetensors" and not _VARIANT.search(file.name)]
    files = [file for file in present if file.name == "config.json"] + weights
    if not weights:
        raise DataError(
            f"extract_features.image_conditioning: {folder} has no .safetensors weights in full precision. Set it to "
            "the folder of a CLIPVisionModelWithProjection that has them."
        )
    return {file.name: provenance.file_sha256(file) for file in files}


def _reason(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or "it cannot be read"
    first = error.errors()[0]
    return printable(f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()[:_LONGEST_REASON])


def _is_inside(name: str) -> bool:
    """Return whether a relative path, "/" between its parts, stays inside its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name
