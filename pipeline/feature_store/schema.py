"""What a feature set says of itself, and what its files hold; see the package's docstring for the layout."""

import hashlib
import logging
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    JsonValue,
    field_validator,
    model_validator,
    with_config,
)
from typing_extensions import TypedDict  # pydantic reads typing's only from Python 3.12 on

from pipeline import provenance
from pipeline.errors import PipelineError
from pipeline.io import hdf5
from pipeline.io.system_errors import reading, status

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
EXTRACT_AGAIN = "delete it and run `pipeline extract-features`, or `dvc pull` a good copy"
FETCH = "`dvc pull` it, or run `pipeline extract-features`"

_STRICT = ConfigDict(strict=True, extra="forbid")
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Rows = Annotated[int, Field(ge=0, lt=2**31)]
_AllRows = Annotated[int, Field(ge=1, lt=2**31)]
_PerShard = Annotated[int, Field(ge=1, lt=2**63)]  # may exceed the set's: then it has one shard


class Fault(PipelineError):
    """Something of a set is not as it should be; `what` says so without the remedy, which is another in an archive."""

    def __init__(self, what: str, remedy: str = EXTRACT_AGAIN) -> None:
        """One line of both."""
        super().__init__(f"{what}: {remedy}")
        self.what = what


def _sha256(stream: BinaryIO) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


class FileEntry(BaseModel):
    """A file of the set.

    Attributes:
        rows: its images (none in basis.h5).
        bytes: its size.
        sha256: of its bytes.
        redone_in_float32: (image, prompt) pairs whose features overflowed the set's dtype and were computed again.
        hardware: the processor or GPU that it was computed on.
    """

    model_config = _STRICT

    file: str = Field(pattern=r"^(basis|shard-[0-9]{5,})\.h5$")
    rows: _Rows
    bytes: _Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    redone_in_float32: _Count
    hardware: str

    def fault(self, folder: Path, sha256: Callable[[BinaryIO], str] = _sha256) -> Fault | None:
        """What is wrong with the file in `folder`, or None; reads the whole file, by `sha256`.

        Raises:
            SystemRefusal: the operating system did not let it be read.
        """
        if wrong := self.size_fault(folder):
            return wrong
        file = folder / self.file
        with hdf5.bytes_of(file) as stream, reading(file):
            if sha256(stream) == self.sha256:
                return None
            if sha256(hdf5.Unmarked(stream)) == self.sha256:  # type: ignore[arg-type]
                log.warning("%s was open for writing when a process was killed; its data are intact", file)
                return None
        hdf5.check_not_written(file)
        return Fault(f"{file} is corrupt (SHA-256 differs from its manifest)")

    def size_fault(self, folder: Path) -> Fault | None:
        """What is wrong with the file by its kind and size, or None.

        Raises:
            SystemRefusal: the operating system did not let it be looked at.
        """
        file = folder / self.file
        found = status(file)
        if found is None:
            return Fault(f"{file} is missing", FETCH)
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            return Fault(f"{file} is not a plain file")
        if found.st_size != self.bytes:
            hdf5.check_not_written(file)
            return Fault(f"{file} has {found.st_size} bytes, its manifest says {self.bytes}")
        return None


@with_config(_STRICT)
class _Backbone(TypedDict, total=False):
    name: str
    source: str
    revision: str | None
    variant: str


@with_config(_STRICT)
class _Provenance(TypedDict, total=False):
    dataset: str
    backbone: _Backbone
    settings: dict[str, JsonValue]
    feddifrc: str
    commit: str | None
    python: str
    packages: dict[str, str | None]
    hardware: list[str]


Provenance = Annotated[dict[str, Any], GetPydanticSchema(lambda _, handler: handler(_Provenance))]
"""What made a set: the data set's name; the backbone's name, source, revision, and variant if its weights are fp16; the
`extract_features` settings; the versions of the program, Python and the packages; every processor or GPU. It is not
part of the fingerprint. Sets made by earlier versions have no settings."""


class Content(BaseModel):
    """Everything that decides the features, and nothing else; its hash is the fingerprint.

    Attributes:
        backbone: the hash of each of its files, by name.
        layers: layer -> [first column, one past its last].
        prompts: per prompt its texts, whose embeddings are averaged; numbered from 0.
        positive: which prompt matches an image: its label's, or the first.
        negatives: how many others it is shown with, or "all".
        basis_images: how many images the basis was fitted on; None if it was given.
        basis_sha256: of the file that the basis was given in; None if it was fitted.
        image_conditioning: the hash of each of the image encoder's files; None without.
    """

    model_config = _STRICT

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

    @field_validator("layers")
    @classmethod
    def _columns_follow_one_another(cls, layers: dict[str, list[int]]) -> dict[str, list[int]]:
        expected = 0
        for name, (start, stop) in layers.items():
            if start != expected or stop <= start:
                raise ValueError(f"{name} has columns {start} to {stop}, not some from {expected} on")
            expected = stop
        return layers

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits; equal fingerprints mean equal features."""
        return provenance.fingerprint(self.model_dump())

    def common(self) -> dict[str, Any]:
        """All of it but the data set: sets that agree on this mean the same by their features."""
        return self.model_dump(exclude={"dataset_hash"})

    @property
    def num_dims(self) -> int:
        """D, the length of a representation."""
        return max(stop for _, stop in self.layers.values())

    @property
    def prompts_per_image(self) -> int:
        """P: one positive and the negatives."""
        total = len(self.prompts)
        return total if isinstance(self.negatives, str) else min(self.negatives + 1, total)


@dataclass(frozen=True)
class Plan:
    """A set to be made: what decides it, how many images it has, how they are cut into shards, and what makes it."""

    content: Content
    rows: _AllRows
    rows_per_shard: _PerShard
    provenance: Provenance

    @property
    def num_shards(self) -> int:
        """How many shards the whole set has."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """The sample indices of a shard."""
        return range(shard * self.rows_per_shard, min(self.rows, (shard + 1) * self.rows_per_shard))


def shard_name(shard: int) -> str:
    """The name of a shard's file, without its suffix."""
    return f"shard-{shard:05d}"


class Manifest(BaseModel):
    """The set's manifest.json; shards may be lacking, those that it names are the set's own."""

    model_config = _STRICT

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
    def _parts_fit(self) -> Self:
        if self.prompts_per_image != self.content.prompts_per_image:
            raise ValueError(f"prompts_per_image is {self.prompts_per_image}, its content says otherwise")
        if (self.basis.file, self.basis.rows) != ("basis.h5", 0):
            raise ValueError("the entry of the basis is another file's")
        for shard, entry in self.shards.items():
            if not 0 <= shard < self.num_shards:
                raise ValueError(f"there is no shard {shard} among {self.num_shards}")
            if (entry.file, entry.rows) != (f"{shard_name(shard)}.h5", len(self.shard_rows(shard))):
                raise ValueError(f"the entry of shard {shard} is another file's")
        return self

    @property
    def num_shards(self) -> int:
        """How many shards the whole set has."""
        return self.plan.num_shards

    @property
    def files(self) -> list[FileEntry]:
        """Every file but the manifest: the basis, then the shards in order."""
        return [self.basis, *(entry for _, entry in sorted(self.shards.items()))]

    @property
    def plan(self) -> Plan:
        """What the set was made from."""
        return Plan(self.content, self.rows, self.rows_per_shard, self.provenance)

    def shard_rows(self, shard: int) -> range:
        """The sample indices of a shard."""
        return self.plan.shard_rows(shard)


@dataclass(frozen=True)
class LayerBasis:
    """PCA of one layer's channels: mean (C,), components (d, C), explained_variance (d,) descending, float64."""

    mean: np.ndarray
    components: np.ndarray
    explained_variance: np.ndarray
    total_variance: float


@dataclass(frozen=True)
class Basis:
    """Per layer its PCA, and the mean and std (D,) of the pooled denoising representations, float64."""

    layers: dict[str, LayerBasis]
    mean: np.ndarray
    std: np.ndarray


FIELDS = {"index": "<i8", "label": "<i8", "denoised": "<f2", "prompted": "<f2", "prompt_class": "<i2"}


@dataclass(frozen=True)
class Features:
    """Representations of n images: the datasets of a shard, by the same names."""

    index: np.ndarray  # int64 (n,)
    label: np.ndarray  # int64 (n,)
    denoised: np.ndarray  # float16 (n, D)
    prompted: np.ndarray  # float16 (n, P, D)
    prompt_class: np.ndarray  # int16 (n, P)

    def crc32(self) -> np.ndarray:
        """uint32 (n,): CRC-32 over each row's fields, little-endian, in the order of this class."""
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
    """Which of its P prompts match each image, bool (n, P): one a row, unless somebody wrote other prompts.

    Args:
        positive: that of its class, or the first prompt, which every image of a self-supervised set has; no label is
            read then.
        prompt_class: int16 (n, P).
        label: int64 (n,).
    """
    return prompt_class == (label[:, None] if positive == "label" else 0)


def positive_columns(positive: Literal["label", "first"], prompt_class: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The column of its positive prompt, int64 (n,), of images that have it; the rest as for `positive_matches`."""
    return positive_matches(positive, prompt_class, label).argmax(1)
