"""The manifest of a feature set and the content of its files; the docstring of the package shows the layout."""

import hashlib
import logging
import math
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    Field,
    GetPydanticSchema,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
    with_config,
)
from typing_extensions import TypedDict  # pydantic supports typing.TypedDict only from Python 3.12 on

from pipeline import provenance
from pipeline.errors import FeatureSetError
from pipeline.io import hdf5
from pipeline.io.system_errors import reading, status

log = logging.getLogger(__name__)

Storage = Literal["float16", "int8"]
FORMAT_VERSIONS = (1, 2, 3)
"""The versions that this program reads. A set has the lowest that allows it (`Content.format_version`): programs that
read this version read the set, and older ones refuse it."""

LEAST_NOISE, MOST_NOISE = 0.01, 100.0
"""The smallest and the largest scale of added noise; float16 would hide less."""

EXTRACT_AGAIN = "Delete it and run `pipeline extract-features`, or `dvc pull` a good copy"
FETCH = "`dvc pull` it, or run `pipeline extract-features`"

FIELDS = {"index": "<i8", "label": "<i8", "denoised": "<f2", "prompted": "<f2", "prompt_class": "<i2"}
"""The arrays of `Features`, with their types."""
_REPRESENTATIONS = ("denoised", "prompted")

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Rows = Annotated[int, Field(ge=0, lt=2**31)]
_AllRows = Annotated[int, Field(ge=1, lt=2**31)]
_PerShard = Annotated[int, Field(ge=1, lt=2**63)]  # may exceed the number of rows: the set then has one shard


class InvalidFeatureSet(FeatureSetError):
    """A feature set is missing, incomplete or damaged.

    Attributes:
        problem: What is wrong, without the remedy, because an archive of the set needs a different one.
    """

    def __init__(self, problem: str, remedy: str = EXTRACT_AGAIN) -> None:
        """Combine both into one line."""
        super().__init__(f"{problem}. {remedy}.")
        self.problem = problem


def _sha256(stream: BinaryIO) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


class FileEntry(BaseModel, strict=True, extra="forbid"):
    """The manifest's entry of one file.

    Attributes:
        file: Its name in the set's folder.
        rows: Number of images in it; 0 for basis.h5.
        bytes: Its size.
        sha256: The SHA-256 of its bytes.
        redone_in_float32: Number of (image, prompt) pairs that overflowed the set's dtype and were recomputed.
        hardware: The processor or GPU that computed it.
    """

    file: str = Field(pattern=r"^(basis|shard-[0-9]{5,})\.h5$")
    rows: _Rows
    bytes: _Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    redone_in_float32: _Count
    hardware: str

    def content_problem(self, folder: Path, sha256: Callable[[BinaryIO], str] = _sha256) -> InvalidFeatureSet | None:
        """Read every byte of the file in `folder` and return what is wrong with it, or None; `sha256` hashes it."""
        if problem := self.size_problem(folder):
            return problem
        file = folder / self.file
        with hdf5.bytes_of(file) as stream, reading(file):
            if sha256(stream) == self.sha256:
                return None
            if sha256(hdf5.Unmarked(stream)) == self.sha256:  # type: ignore[arg-type]
                log.warning("%s was open for writing when a process was killed; its data are intact", file)
                return None
        hdf5.check_not_written(file)
        return InvalidFeatureSet(f"{file} is corrupt (SHA-256 differs from its manifest)")

    def size_problem(self, folder: Path) -> InvalidFeatureSet | None:
        """Return what is wrong with the kind and size of the file in `folder`, or None."""
        file = folder / self.file
        if (found := status(file)) is None:
            return InvalidFeatureSet(f"{file} is missing", FETCH)
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would block
            return InvalidFeatureSet(f"{file} is not a regular file")
        if found.st_size != self.bytes:
            hdf5.check_not_written(file)
            return InvalidFeatureSet(f"{file} has {found.st_size} bytes (its manifest says {self.bytes})")
        return None


@with_config(strict=True, extra="forbid")
class _Backbone(TypedDict, total=False):
    name: str
    source: str
    revision: str | None
    variant: str


@with_config(strict=True, extra="forbid")
class _Provenance(TypedDict, total=False):
    dataset: str
    backbone: _Backbone
    seen_images: Annotated[int, Field(ge=0, lt=2**63)]
    settings: dict[str, JsonValue]
    feddifrc: str
    commit: str | None
    python: str
    packages: dict[str, str | None]
    hardware: list[str]


Provenance = Annotated[dict[str, Any], GetPydanticSchema(lambda _, handler: handler(_Provenance))]
"""The origin of a set: its data set; the backbone's name, source, revision, and variant if its weights are fp16; the
`extract_features` settings; the versions of the program, Python and the packages; every processor or GPU. `seen_images`
is the number of the data set's images that the backbone was trained on, if `prepare-backbone` trained it. Nothing of
this is part of the fingerprint. Sets made by earlier versions have no settings."""


class Noise(BaseModel, strict=True, extra="forbid"):
    """Gaussian noise that was added to every number of the representations.

    Attributes:
        scale: Its standard deviation, in multiples of each dimension's own (`Basis.std`).
        draw: 32 random hexadecimal digits, which tell one draw of noise from another. They are not its seed: nobody
            can compute the noise from them.
    """

    scale: float = Field(ge=LEAST_NOISE, le=MOST_NOISE, allow_inf_nan=False)
    draw: str = Field(pattern=r"^[0-9a-f]{32}$")

    def __str__(self) -> str:
        """Return the scale in words."""
        return f"noise of {self.scale:g} standard deviation{'' if self.scale == 1 else 's'}"


class Content(BaseModel, strict=True, extra="forbid"):
    """Everything that determines the features, and nothing else; its hash is the fingerprint.

    Attributes:
        extraction_version: Version of the extraction code.
        dataset_hash: Hash of the data set's pixels, labels and class names.
        class_names: Class names by label.
        backbone: File name -> hash, of the frozen model.
        timestep: Diffusion timestep of the noise.
        image_size: Side of the square input, in pixels.
        layers: Layer -> [first column, last column + 1].
        prompts: Per prompt its texts, whose embeddings are averaged. `prompt_class` counts in this list.
        positive: The prompt that matches an image: that of its label, or the first one.
        denoise_prompt: The prompt of the denoising representation.
        negatives: Number of non-matching prompts per image, or "all".
        noise_seed: Seed of the noise.
        basis_images: Number of images that the basis was fitted on; None if it was given.
        basis_sha256: SHA-256 of the given basis file; None if the basis was fitted.
        image_conditioning: File name -> hash, of the image encoder; None without one.
        dtype: Floating-point type of the passes.
        storage: Type of the representations in the shards.
        added_noise: The noise that an export added to the representations; None for a set as it was extracted.
    """

    extraction_version: _Count
    dataset_hash: str
    class_names: list[str] = Field(min_length=1)
    backbone: dict[str, str]
    timestep: _Count
    image_size: _Count
    layers: dict[str, Annotated[list[_Rows], Field(min_length=2, max_length=2)]] = Field(min_length=1)
    prompts: list[Annotated[list[str], Field(min_length=1)]] = Field(min_length=1)
    positive: Literal["label", "first"]
    denoise_prompt: str
    negatives: Literal["all"] | Annotated[int, Field(ge=1)]
    noise_seed: int = Field(ge=0)
    basis_images: _Count | None
    basis_sha256: str | None
    image_conditioning: dict[str, str] | None
    dtype: str
    storage: Storage = "float16"
    added_noise: Noise | None = None

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what version 1 did not have, so that the fingerprints of its sets stay what they were."""
        defaults = {"storage": "float16", "added_noise": None}
        return {key: value for key, value in handler(self).items() if key not in defaults or value != defaults[key]}

    @field_validator("layers")
    @classmethod
    def _columns_are_consecutive(cls, layers: dict[str, list[int]]) -> dict[str, list[int]]:
        expected = 0
        for name, (start, stop) in layers.items():
            if start != expected or stop <= start:
                raise ValueError(f"{name} has columns {start} to {stop}, but must start at {expected} and not be empty")
            expected = stop
        return layers

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits; equal fingerprints mean equal features."""
        return provenance.fingerprint(self.model_dump())

    def common(self) -> dict[str, Any]:
        """Return everything but the data set and the noise's draw: sets that agree on it have comparable features."""
        return self.model_dump(exclude={"dataset_hash": True, "added_noise": {"draw"}})

    @property
    def format_version(self) -> int:
        """The lowest format version that has such sets: 1, or 2 with int8, or 3 with noise."""
        if self.added_noise:
            return 3
        return 2 if self.storage == "int8" else 1

    @property
    def num_dims(self) -> int:
        """D, the length of a representation."""
        return max(stop for _, stop in self.layers.values())

    @property
    def prompts_per_image(self) -> int:
        """P: one matching prompt and the others."""
        total = len(self.prompts)
        return total if isinstance(self.negatives, str) else min(self.negatives + 1, total)

    @property
    def datasets(self) -> dict[str, str]:
        """The datasets of a shard, by name, with their types."""
        stored = dict.fromkeys(_REPRESENTATIONS, "<i1") if self.storage == "int8" else {}
        return {**FIELDS, **stored, "crc32": "<u4"}

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each of `datasets` for that many rows."""
        p, d = self.prompts_per_image, self.num_dims
        per_row = {"denoised": (d,), "prompted": (p, d), "prompt_class": (p,)}
        return {name: (rows, *per_row.get(name, ())) for name in self.datasets}

    @property
    def row_bytes(self) -> int:
        """Bytes per image in a shard."""
        return self._row_bytes(self.datasets)

    @property
    def read_row_bytes(self) -> int:
        """Bytes per image in memory, once read; equal for sets of the same dimensions and prompts."""
        return self._row_bytes(FIELDS)

    def _row_bytes(self, types: dict[str, str]) -> int:
        shapes = self.shapes(1)
        return sum(math.prod(shapes[name]) * np.dtype(dtype).itemsize for name, dtype in types.items())


@dataclass(frozen=True)
class Plan:
    """A set to extract: its content, number of images, images per shard, and provenance."""

    content: Content
    rows: _AllRows
    rows_per_shard: _PerShard
    provenance: Provenance

    @property
    def num_shards(self) -> int:
        """Number of shards of the complete set."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Return the sample indices of a shard."""
        return range(shard * self.rows_per_shard, min(self.rows, (shard + 1) * self.rows_per_shard))


def shard_name(shard: int) -> str:
    """Return the name of a shard's file, without its suffix."""
    return f"shard-{shard:05d}"


class Manifest(BaseModel, strict=True, extra="forbid"):
    """The set's manifest.json. It may lack shards; those that it names belong to the set."""

    format_version: int
    fingerprint: str
    content: Content
    rows: _AllRows
    rows_per_shard: _PerShard
    prompts_per_image: int
    redone_in_float32: _Count
    basis: FileEntry
    shards: dict[int, FileEntry]
    provenance: Provenance

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.format_version != (version := self.content.format_version):
            raise ValueError(f"format_version is {self.format_version}, but its content has version {version}")
        if self.prompts_per_image != self.content.prompts_per_image:
            raise ValueError(f"prompts_per_image is {self.prompts_per_image}, but its content says otherwise")
        if (self.basis.file, self.basis.rows) != ("basis.h5", 0):
            raise ValueError("the entry of the basis describes another file")
        for shard, entry in self.shards.items():
            if not 0 <= shard < self.plan.num_shards:
                raise ValueError(f"shard {shard} is not one of {self.plan.num_shards}")
            if (entry.file, entry.rows) != (f"{shard_name(shard)}.h5", len(self.plan.shard_rows(shard))):
                raise ValueError(f"the entry of shard {shard} describes another file")
        return self

    @property
    def files(self) -> list[FileEntry]:
        """Every file but the manifest: the basis, then the shards in order."""
        return [self.basis, *(entry for _, entry in sorted(self.shards.items()))]

    @property
    def plan(self) -> Plan:
        """The plan that the set was made from."""
        return Plan(self.content, self.rows, self.rows_per_shard, self.provenance)


@dataclass(frozen=True)
class LayerBasis:
    """PCA of one layer's channels: mean (C,), components (d, C), explained_variance (d,) descending, float64."""

    mean: np.ndarray
    components: np.ndarray
    explained_variance: np.ndarray
    total_variance: float


@dataclass(frozen=True)
class Basis:
    """The PCA of each layer, and mean and std (D,) of the pooled denoising representations, float64."""

    layers: dict[str, LayerBasis]
    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True, repr=False)
class Features:
    """Representations of n images, or of one image, whose arrays then lack the axis n.

    Index it like an array: `rows[0]` is one image, `rows[2:5]` and `rows[[1, 3]]` are several.

    Attributes:
        index: int64 (n,), positions in the training split.
        label: int64 (n,).
        denoised: float16 (n, D), denoising representations.
        prompted: float16 (n, P, D), representations under each of the image's prompts.
        prompt_class: int16 (n, P), the numbers of these prompts.
    """

    index: np.ndarray
    label: np.ndarray
    denoised: np.ndarray
    prompted: np.ndarray
    prompt_class: np.ndarray

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.index)

    def __getitem__(self, rows: Any) -> "Features":
        """Return one image, for an integer, or several, for any other index of a NumPy array."""
        return Features(**{name: values[rows] for name, values in vars(self).items()})

    def __repr__(self) -> str:
        """Return the type and shape of each array."""
        arrays = (f"{name} {values.dtype} {values.shape}" for name, values in vars(self).items())
        return f"Features({', '.join(arrays)})"

    def crc32(self) -> np.ndarray:
        """Return uint32 (n,): the CRC-32 of each row's fields, little-endian, in the order of this class."""
        fields = [np.ascontiguousarray(getattr(self, name)) for name in FIELDS]
        rows = [(field.reshape(-1).view(np.uint8).data, field.nbytes // len(field)) for field in fields if len(field)]
        sums = np.empty(len(self.index), np.uint32)
        for row in range(len(sums)):
            checksum = 0
            for data, size in rows:
                checksum = zlib.crc32(data[row * size : (row + 1) * size], checksum)
            sums[row] = checksum
        return sums


def positive_matches(positive: Literal["label", "first"], prompt_class: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return which of its P prompts match each image, bool (n, P); exactly one per row in a valid set.

    Args:
        positive: "label": the prompt of the image's class. "first": prompt 0, which every image of a self-supervised
            set has; labels are then not used.
        prompt_class: int16 (n, P).
        label: int64 (n,).
    """
    return prompt_class == (label[:, None] if positive == "label" else 0)
