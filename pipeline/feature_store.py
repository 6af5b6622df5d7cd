"""The feature set on disk: all that stage 1 and stage 2 share. Nothing else knows this layout.

A feature set is a folder:

    manifest.json     what decides the features ("content", hashed into the fingerprint), what made them
                      ("provenance"), and per file its rows, bytes and SHA-256; format version 1
    basis.h5          per layer: mean (C,), components (d, C), explained_variance (d,), total_variance ();
                      and mean (D,), std (D,) of the denoising representations of the basis images; all float64
    shard-00000.h5    index int64 (n,), label int64 (n,), denoised float16 (n, D), prompted float16 (n, P, D),
    shard-00001.h5    prompt_class int16 (n, P), crc32 uint32 (n,); attribute fingerprint
    ...

`index` counts from 0 in the training split; shard k holds the rows k*rows_per_shard and on. Datasets are contiguous
and uncompressed: a row is then a slice of the file and is read through a memory map at memory speed, which filters
and chunks would prevent (they also save little on dense float16). `crc32` covers the other fields of its row, so that
a flipped bit is noticed by whoever reads the row, without hashing the file.

Files appear whole or not at all: each is written under a temporary name, closed, synced and renamed, then entered in
the manifest. A killed run therefore leaves a set that says exactly what it has. No pickle anywhere.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline import provenance
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_EXTRACT_AGAIN = "delete it and run `pipeline extract-features`, or `dvc pull` a good copy"


class FileEntry(BaseModel):
    """A file of the set: its size in bytes and SHA-256; rows are images (none in basis.h5)."""

    model_config = ConfigDict(strict=True, extra="forbid")

    file: str = Field(pattern=r"^(basis|shard-\d{5})\.h5$")
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Content(BaseModel):
    """Everything that decides the features, and nothing else; its hash is the fingerprint."""

    model_config = ConfigDict(strict=True, extra="forbid")

    extraction_version: int
    dataset_hash: str
    class_names: list[str]
    backbone: dict[str, Any]  # id, revision and the hashes of the weights
    timestep: int
    image_size: int
    layers: dict[str, list[int]]  # layer name -> [first column, one past its last]
    prompt_template: str
    denoise_prompt: str
    negatives: str | int
    noise_seed: int
    basis_images: int
    dtype: str

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits; equal fingerprints mean equal features."""
        return provenance.fingerprint(self.model_dump())

    @property
    def num_dims(self) -> int:
        """D, the length of a representation."""
        return max(stop for _, stop in self.layers.values())


class Manifest(BaseModel):
    """The set's manifest.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format_version: int
    fingerprint: str
    content: Content
    rows: int
    rows_per_shard: int
    prompts_per_image: int
    basis: FileEntry | None = None
    shards: dict[int, FileEntry] = {}
    provenance: dict[str, Any]

    @property
    def num_shards(self) -> int:
        """How many shards the whole set has."""
        return -(-self.rows // self.rows_per_shard)

    @property
    def complete(self) -> bool:
        """Whether every file has been entered."""
        return self.basis is not None and len(self.shards) == self.num_shards

    def shard_rows(self, shard: int) -> range:
        """The sample indices of a shard."""
        return range(shard * self.rows_per_shard, min(self.rows, (shard + 1) * self.rows_per_shard))


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
        sums = np.empty(len(self.index), np.uint32)
        for row in range(len(sums)):
            checksum = 0
            for name in _FIELDS:
                checksum = zlib.crc32(np.ascontiguousarray(getattr(self, name)[row : row + 1]).data, checksum)
            sums[row] = checksum
        return sums


_FIELDS = {"index": "<i8", "label": "<i8", "denoised": "<f2", "prompted": "<f2", "prompt_class": "<i2"}


class FeatureSetWriter:
    """Writes a set in a staging folder, shard by shard, continuing what a killed run left there."""

    def __init__(self, staging: Path, manifest: Manifest) -> None:
        """Starts or continues a set; keeps of an earlier run every file that is still what its manifest says."""
        self.path = staging
        self.manifest = manifest
        staging.mkdir(parents=True, exist_ok=True)
        if (staging / "manifest.json").exists():
            with contextlib.suppress(PipelineError):
                self._keep_what_stands(read_manifest(staging))

    def _keep_what_stands(self, earlier: Manifest) -> None:
        same_layout = (earlier.rows, earlier.rows_per_shard) == (self.manifest.rows, self.manifest.rows_per_shard)
        if earlier.fingerprint != self.manifest.fingerprint or not same_layout:
            return
        if earlier.basis and not _difference(self.path, earlier.basis):
            self.manifest.basis = earlier.basis
            self.manifest.shards = {
                shard: entry for shard, entry in sorted(earlier.shards.items()) if not _difference(self.path, entry)
            }

    @property
    def missing_shards(self) -> list[int]:
        """The shards still to be computed, ascending."""
        return [shard for shard in range(self.manifest.num_shards) if shard not in self.manifest.shards]

    def write_basis(self, basis: Basis) -> None:
        """Writes basis.h5 and enters it; shards projected on another basis are forgotten."""
        with self._new_file("basis.h5") as h5:
            h5.attrs["fingerprint"] = self.manifest.fingerprint
            h5.create_dataset("mean", data=basis.mean)
            h5.create_dataset("std", data=basis.std)
            for name, layer in basis.layers.items():
                group = h5.create_group(f"layers/{name}")
                for field, value in vars(layer).items():
                    group.create_dataset(field, data=value)
        self.manifest.basis = self._entry("basis.h5", rows=0)
        self.manifest.shards = {}
        self._save_manifest()

    def write_shard(self, shard: int, features: Features) -> None:
        """Writes a shard and enters it.

        Raises:
            PipelineError: a feature is not finite.
        """
        for name in ("denoised", "prompted"):
            if not np.isfinite(getattr(features, name)).all():
                raise PipelineError(
                    f"shard {shard}: {name} features are not finite: the model overflowed "
                    f"{self.manifest.content.dtype}; use extract_features.dtype: bfloat16 or float32"
                )
        file = f"shard-{shard:05d}.h5"
        with self._new_file(file) as h5:
            h5.attrs["fingerprint"] = self.manifest.fingerprint
            for name, dtype in _FIELDS.items():
                h5.create_dataset(name, data=getattr(features, name).astype(dtype, copy=False))
            h5.create_dataset("crc32", data=features.crc32())
        self.manifest.shards[shard] = self._entry(file, rows=len(features.index))
        self.manifest.shards = dict(sorted(self.manifest.shards.items()))
        self._save_manifest()

    def publish(self, target: Path) -> None:
        """Puts the complete set at `target`, whole or not at all, by hard links where the file system has them.

        The staging copy stays: should the caller be killed before it has noted the result, nothing is computed twice.
        """
        assert self.manifest.complete
        incoming = target.with_name(target.name + ".tmp")
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        assert self.manifest.basis
        names = [self.manifest.basis.file, *(entry.file for entry in self.manifest.shards.values()), "manifest.json"]
        for name in names:
            _link_or_copy(self.path / name, incoming / name)
        shutil.rmtree(target, ignore_errors=True)
        incoming.replace(target)

    @contextlib.contextmanager
    def _new_file(self, name: str) -> Iterator[h5py.File]:
        temporary = self.path / f"{name}.tmp"
        try:
            with h5py.File(temporary, "w") as h5:
                yield h5
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(temporary)
        temporary.replace(self.path / name)
        _sync(self.path)

    def _entry(self, file: str, rows: int) -> FileEntry:
        path = self.path / file
        return FileEntry(file=file, rows=rows, bytes=path.stat().st_size, sha256=provenance.file_sha256(path))

    def _save_manifest(self) -> None:
        provenance.write_json(self.path / "manifest.json", self.manifest.model_dump(mode="json"))
        _sync(self.path)


class FeatureSet:
    """A complete set, opened for reading."""

    def __init__(self, path: Path) -> None:
        """Opens the set in folder `path`; sizes are checked here, rows as they are read.

        Raises:
            PipelineError: there is none, it is incomplete, or a file is missing or of another size.
        """
        self.path = path
        self.manifest = read_manifest(path)
        if not self.manifest.complete:
            have, want = len(self.manifest.shards), self.manifest.num_shards
            raise PipelineError(f"{path} is incomplete ({have} of {want} shards): run `pipeline extract-features`")
        for entry in self._entries():
            file = path / entry.file
            size = file.stat().st_size if file.exists() else None
            if size != entry.bytes:
                found = "is missing" if size is None else f"has {size} bytes, its manifest says {entry.bytes}"
                raise PipelineError(f"{file} {found}: {_EXTRACT_AGAIN}")

    def basis(self) -> Basis:
        """The PCA basis and the statistics beside it."""
        return read_basis(self.path, self.manifest)

    def read(self, index: np.ndarray) -> Features:
        """The rows of these samples, in this order, checked against their checksums.

        Args:
            index: int64 (n,), positions in the training split.

        Raises:
            PipelineError: a sample is not in the set, or a row's bytes are not what was written.
        """
        index = np.asarray(index, np.int64)
        if len(index) and (index.min() < 0 or index.max() >= self.manifest.rows):
            raise PipelineError(f"{self.path} holds samples 0 to {self.manifest.rows - 1}, not {index.max()}")
        n, p, d = len(index), self.manifest.prompts_per_image, self.manifest.content.num_dims
        shapes = {"index": (n,), "label": (n,), "denoised": (n, d), "prompted": (n, p, d), "prompt_class": (n, p)}
        rows = Features(**{name: np.empty(shapes[name], dtype) for name, dtype in _FIELDS.items()})
        shard_of = index // self.manifest.rows_per_shard
        for shard in np.unique(shard_of):
            self._fill(rows, np.flatnonzero(shard_of == shard), int(shard), index)
        return rows

    def positive_prompts(self, rows: Features) -> np.ndarray:
        """Which of its P prompts matches each image: int64 (n,), columns of `rows.prompted`."""
        return (rows.prompt_class == rows.label[:, None]).argmax(1)

    def verify(self) -> None:
        """Reads every byte: file checksums, row checksums, labels, index coverage, finiteness.

        Raises:
            PipelineError: names the first file that is not what was written.
        """
        for entry in self._entries():
            if problem := _difference(self.path, entry):
                raise PipelineError(f"{problem}: {_EXTRACT_AGAIN}")
        for shard in self.manifest.shards:
            rows = self.read(np.array(self.manifest.shard_rows(shard)))
            if not (np.isfinite(rows.denoised).all() and np.isfinite(rows.prompted).all()):
                raise PipelineError(f"{self.path}, shard {shard}: features are not finite: {_EXTRACT_AGAIN}")

    def _entries(self) -> list[FileEntry]:
        assert self.manifest.basis
        return [self.manifest.basis, *self.manifest.shards.values()]

    def _fill(self, rows: Features, places: np.ndarray, shard: int, index: np.ndarray) -> None:
        """Copies one shard's part of `index` into `rows`."""
        file = self.path / self.manifest.shards[shard].file
        local = index[places] - shard * self.manifest.rows_per_shard
        with _open(file, self.manifest.fingerprint) as h5:
            try:
                for name in _FIELDS:
                    getattr(rows, name)[places] = _map(file, h5[name])[local]
                stored = _map(file, h5["crc32"])[local]
            except (KeyError, ValueError, IndexError, OSError) as error:
                raise PipelineError(f"{file} does not have the layout of a shard ({error}): {_EXTRACT_AGAIN}") from None
        got = Features(**{name: getattr(rows, name)[places] for name in _FIELDS})
        wrong = np.flatnonzero((got.crc32() != stored) | (got.index != index[places]))
        if len(wrong):
            raise PipelineError(f"{file}: row {local[wrong[0]]} is corrupt (checksum differs): {_EXTRACT_AGAIN}")


def read_manifest(path: Path) -> Manifest:
    """Reads and checks manifest.json of the set in folder `path`.

    Raises:
        PipelineError: it is missing, no manifest, of another format version, or its fingerprint is not its content's.
    """
    file = path / "manifest.json"
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise PipelineError(f"{path} holds no feature set: run `pipeline extract-features`, or `dvc pull` it") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "the whole file"
        raise PipelineError(f"{file} is not a manifest ({where}: {error.errors()[0]['msg']})") from None
    except OSError as error:
        raise PipelineError(f"{file} cannot be read ({error})") from None
    if manifest.format_version != FORMAT_VERSION:
        raise PipelineError(
            f"{file} has format version {manifest.format_version}, this program reads {FORMAT_VERSION}: update it"
        )
    if manifest.fingerprint != manifest.content.fingerprint:
        raise PipelineError(f"{file} was changed by hand: its fingerprint is not that of its content")
    return manifest


def read_basis(path: Path, manifest: Manifest) -> Basis:
    """Reads basis.h5 of the set in folder `path`, finished or not.

    Raises:
        PipelineError: it is missing, corrupt, or another set's.
    """
    assert manifest.basis
    if problem := _difference(path, manifest.basis):
        raise PipelineError(f"{problem}: {_EXTRACT_AGAIN}")
    with _open(path / manifest.basis.file, manifest.fingerprint) as h5:
        layers = {}
        for name in manifest.content.layers:
            fields = {field: value[()] for field, value in h5[f"layers/{name}"].items()}
            layers[name] = LayerBasis(**fields | {"total_variance": float(fields["total_variance"])})
        return Basis(layers, h5["mean"][()], h5["std"][()])


@contextlib.contextmanager
def lock(staging: Path) -> Iterator[None]:
    """Holds the staging folder for this process; waits, naming the holder, while another one has it."""
    staging.mkdir(parents=True, exist_ok=True)
    with (staging / ".lock").open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            log.warning("process %s is extracting this set: waiting for it", stream.read().strip() or "?")
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        stream.truncate()
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def new_manifest(
    content: Content, rows: int, rows_per_shard: int, prompts_per_image: int, made_by: Mapping
) -> Manifest:
    """The manifest of a set of which nothing has been computed yet."""
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=content.fingerprint,
        content=content,
        rows=rows,
        rows_per_shard=rows_per_shard,
        prompts_per_image=prompts_per_image,
        provenance=dict(made_by),
    )


def _difference(folder: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file against its entry, or None; reads the whole file."""
    file = folder / entry.file
    if not file.exists():
        return f"{file} is missing"
    if file.stat().st_size != entry.bytes:
        return f"{file} has {file.stat().st_size} bytes, its manifest says {entry.bytes}"
    if provenance.file_sha256(file) != entry.sha256:
        return f"{file} is corrupt (SHA-256 differs from its manifest)"
    return None


@contextlib.contextmanager
def _open(file: Path, fingerprint: str) -> Iterator[h5py.File]:
    try:
        h5 = h5py.File(file, "r")
    except OSError as error:
        raise PipelineError(f"{file} is not a whole HDF5 file ({error}): {_EXTRACT_AGAIN}") from None
    with h5:
        if h5.attrs.get("fingerprint") != fingerprint:
            raise PipelineError(f"{file} belongs to another feature set (fingerprint differs): {_EXTRACT_AGAIN}")
        yield h5


def _map(file: Path, dataset: h5py.Dataset) -> np.ndarray:
    """A read-only memory map of a contiguous dataset: fancy indexing through h5py is a hundred times slower."""
    offset = dataset.id.get_offset()
    if offset is None:
        raise ValueError(f"dataset {dataset.name} is not contiguous")
    return np.memmap(file, dataset.dtype, "r", offset, dataset.shape)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
