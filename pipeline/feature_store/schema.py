"""What a feature set says of itself, and what its files hold; see the package's docstring for the layout."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline import provenance

FORMAT_VERSION = 1
EXTRACT_AGAIN = "delete it and run `pipeline extract-features`, or `dvc pull` a good copy"


class FileEntry(BaseModel):
    """A file of the set.

    Attributes:
        rows: its images (none in basis.h5).
        bytes: its size.
        sha256: of its bytes.
        redone_in_float32: (image, prompt) pairs whose features overflowed the set's dtype and were computed again.
        hardware: the processor or GPU that it was computed on.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    file: str = Field(pattern=r"^(basis|shard-[0-9]{5,})\.h5$")
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    redone_in_float32: int = Field(ge=0)
    hardware: str

    def difference(self, folder: Path) -> str | None:
        """What is wrong with the file in `folder`, or None; reads the whole file."""
        file = folder / self.file
        if problem := self.size_difference(folder):
            return problem
        if provenance.file_sha256(file) != self.sha256:
            return f"{file} is corrupt (SHA-256 differs from its manifest)"
        return None

    def size_difference(self, folder: Path) -> str | None:
        """What is wrong with the file's size, or None."""
        file = folder / self.file
        if not file.exists():
            return f"{file} is missing"
        if file.stat().st_size != self.bytes:
            return f"{file} has {file.stat().st_size} bytes, its manifest says {self.bytes}"
        return None


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

    model_config = ConfigDict(strict=True, extra="forbid")

    extraction_version: int
    dataset_hash: str
    class_names: list[str]
    backbone: dict[str, str]
    timestep: int
    image_size: int
    layers: dict[str, Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]] = Field(
        min_length=1
    )
    prompts: list[list[str]]
    positive: Literal["label", "first"]
    denoise_prompt: str
    negatives: str | int
    noise_seed: int
    basis_images: int | None
    basis_sha256: str | None
    image_conditioning: dict[str, str] | None
    dtype: str

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
    rows: int
    rows_per_shard: int
    provenance: dict[str, Any]

    @property
    def num_shards(self) -> int:
        """How many shards the whole set has."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """The sample indices of a shard."""
        return range(shard * self.rows_per_shard, min(self.rows, (shard + 1) * self.rows_per_shard))


class Manifest(BaseModel):
    """The set's manifest.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format_version: int
    fingerprint: str
    content: Content
    rows: int = Field(ge=1)
    rows_per_shard: int = Field(ge=1)
    prompts_per_image: int = Field(ge=1)
    redone_in_float32: int
    basis: FileEntry
    shards: dict[int, FileEntry]
    provenance: dict[str, Any]

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


def positive_columns(positive: Literal["label", "first"], prompt_class: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Which of its P prompts matches each image, int64 (n,).

    Args:
        positive: that of its class, or the first prompt, which every image of a self-supervised set has; no label is
            read then.
        prompt_class: int16 (n, P).
        label: int64 (n,).
    """
    matching = label[:, None] if positive == "label" else 0
    return (prompt_class == matching).argmax(1)
