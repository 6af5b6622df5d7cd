"""Reads a feature set: nothing damaged, incomplete or foreign is read without being named."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
from pydantic import BaseModel, StrictInt, ValidationError

from pipeline.errors import PipelineError
from pipeline.feature_store.schema import (
    FIELDS,
    FORMAT_VERSION,
    Basis,
    Fault,
    Features,
    FileEntry,
    LayerBasis,
    Manifest,
    positive_matches,
)
from pipeline.feature_store.shards import MALFORMED, Shards, opened, said
from pipeline.io.hdf5 import check_not_written, open_to_read, plain_dataset
from pipeline.io.system_errors import reading, status
from pipeline.text import printable

_BLOCK = 256  # rows copied and checked at a time: they stay in the processor's cache between the two
_LISTED = 8  # missing shards named one by one
_LONGEST = 200  # characters of what a file says of itself, in an error
_PARALLEL = 4  # threads of a long reading; copying and checksums let go of the interpreter


class _Versioned(BaseModel):
    """What a manifest of any format version says first; a newer one may have keys that are not known here."""

    format_version: StrictInt


class FeatureSet:
    """A set, opened for reading."""

    def __init__(self, path: Path, unchecked: bool = False, partial: bool = False) -> None:
        """Opens the set in folder `path`; sizes are checked here, rows as they are read.

        Args:
            path: the folder.
            unchecked: open it also if files are missing or damaged; each is then named when it is read.
            partial: shards may be missing, as where a colleague pulled some of them; `require` then says whether the
                rows that are wanted are there.

        Raises:
            PipelineError: there is none, it is incomplete, or a file is missing or of another size.
        """
        self.path = path
        self.manifest = read_manifest(path)
        self._shards = Shards(path, self.manifest)
        self._absent: dict[int, FileEntry] = {}
        self._labels: np.ndarray | None = None
        if unchecked:
            return
        have, want = len(self.manifest.shards), self.manifest.num_shards
        if have != want:
            raise Fault(f"{path} is incomplete ({have} of {want} shards)", "run `pipeline extract-features`")
        if partial:
            shards = self.manifest.shards.items()
            self._absent = {shard: entry for shard, entry in shards if status(path / entry.file) is None}
        for entry in self._entries():
            if wrong := entry.size_fault(path):
                raise wrong

    def expect_labels(self, labels: np.ndarray) -> None:
        """Refuses from now on to read rows whose labels are not these: a set's maker may have written any.

        Args:
            labels: int64 (rows,), the data set's, of the whole training split.

        Raises:
            PipelineError: there are more or fewer than the set has rows.
        """
        if len(labels) != self.manifest.rows:
            raise PipelineError(f"{self.path} holds {self.manifest.rows} samples, the data set has {len(labels)}")
        self._labels = labels

    def require(self, index: np.ndarray) -> None:
        """Checks that the shards of these samples are here.

        Args:
            index: int64 (n,), positions in the training split.

        Raises:
            PipelineError: some are not; names them, and the command that brings them.
        """
        needed = set((np.asarray(index, np.int64) // self.manifest.rows_per_shard).tolist())
        missing = [entry.file for shard, entry in sorted(self._absent.items()) if shard in needed]
        if missing:
            here = os.path.relpath(self.path)
            few = len(missing) <= _LISTED
            files = ", ".join(missing) if few else f"{missing[0]} and {len(missing) - 1} more"
            wanted = " ".join(f"{here}/{file}" for file in missing) if few else here
            raise PipelineError(
                f"{self.path} lacks {files} of the {len(needed)} shards that these samples are in: `dvc pull {wanted}`"
            )

    def basis(self) -> Basis:
        """The PCA basis and the statistics beside it."""
        content = self.manifest.content
        basis = read_basis(self.path, self.manifest.basis, self.manifest.fingerprint, list(content.layers))
        for name, (start, stop) in content.layers.items():
            if (count := len(basis.layers[name].components)) != stop - start:
                file = self.path / self.manifest.basis.file
                raise Fault(f"{file} has {count} dimensions of {name}, the manifest says {stop - start}")
        return basis

    def read(self, index: np.ndarray) -> Features:
        """The rows of these samples, in this order, checked against their checksums.

        Args:
            index: int64 (n,), positions in the training split.

        Raises:
            PipelineError: a sample is not in the set, or a row's bytes are not what was written, or its label is not
                the one that is expected.
        """
        index = np.asarray(index, np.int64)
        if len(beyond := index[(index < 0) | (index >= self.manifest.rows)]):
            raise PipelineError(f"{self.path} holds samples 0 to {self.manifest.rows - 1}, not {beyond[0]}")
        shard_of = index // self.manifest.rows_per_shard
        for shard in np.unique(shard_of):
            self._shards.check(int(shard))  # before memory is taken for the rows: a manifest may say anything
        shapes = self._shards.shapes(len(index))
        rows = Features(**{name: np.empty(shapes[name], dtype) for name, dtype in FIELDS.items()})
        parts = [
            (int(shard), places)
            for shard in np.unique(shard_of)
            for places in _blocks(np.flatnonzero(shard_of == shard))
        ]
        if len(index) < _PARALLEL * _BLOCK:  # a training batch: threads would cost more than they gain
            for shard, places in parts:
                self._fill(rows, places, shard, index)
        else:
            with ThreadPoolExecutor(_PARALLEL) as pool:
                for _ in pool.map(lambda part: self._fill(rows, part[1], part[0], index), parts):
                    pass
        return rows

    def positive_prompts(self, rows: Features) -> np.ndarray:
        """Which of its P prompts matches each image: int64 (n,), columns of `rows.prompted`.

        Raises:
            PipelineError: an image has no such prompt, or has it twice.
        """
        matching = positive_matches(self.manifest.content.positive, rows.prompt_class, rows.label)
        if len(wrong := np.flatnonzero(matching.sum(1) != 1)):
            raise Fault(f"{self.path}: sample {rows.index[wrong[0]]} does not have its positive prompt once")
        return matching.argmax(1)

    def verify_files(self) -> None:
        """Compares every file with its checksum in the manifest.

        Raises:
            PipelineError: names the first file that is not what was written.
        """
        for entry in self._entries():
            if wrong := entry.fault(self.path):
                raise wrong

    def _entries(self) -> list[FileEntry]:
        """The files that should be here."""
        shards = self.manifest.shards.items()
        return [self.manifest.basis, *(entry for shard, entry in shards if shard not in self._absent)]

    def _fill(self, rows: Features, places: np.ndarray, shard: int, index: np.ndarray) -> None:
        """Copies one block of one shard into `rows` and checks it."""
        maps = self.open_shard(shard)
        local = index[places] - shard * self.manifest.rows_per_shard
        into, source = _as_slice(places), _as_slice(local)
        for name in FIELDS:
            getattr(rows, name)[into] = maps[name][source]
        got = Features(**{name: getattr(rows, name)[into] for name in FIELDS})
        file = self.path / self.manifest.shards[shard].file
        if len(wrong := np.flatnonzero(got.crc32() != maps["crc32"][source])):
            raise self._changed(file, f"row {local[wrong[0]]} is corrupt (checksum differs)")
        if len(wrong := np.flatnonzero(got.index != index[places])):
            sample, other = index[places][wrong[0]], got.index[wrong[0]]
            raise self._changed(file, f"row {local[wrong[0]]} holds sample {other}, not sample {sample}")
        if self._labels is not None and len(wrong := np.flatnonzero(got.label != self._labels[index[places]])):
            sample, label = got.index[wrong[0]], got.label[wrong[0]]
            raise self._changed(file, f"sample {sample} has label {label}, in the data set {self._labels[sample]}")

    @staticmethod
    def _changed(file: Path, what: str) -> PipelineError:
        """The fault of a row, unless a process writes the file: then nothing is known of it."""
        check_not_written(file)
        return Fault(f"{file}: {what}")

    def open_shard(self, shard: int) -> dict[str, np.ndarray]:
        """The shard's datasets as memory maps, by name; no HDF5 handle stays open, so processes may fork.

        Raises:
            PipelineError: the file is missing, not a whole HDF5 file, another set's, or not laid out as a shard; or the
                operating system did not let it be read.
        """
        return self._shards.open(shard)


def read_manifest(path: Path) -> Manifest:
    """Reads and checks manifest.json of the set in folder `path`.

    Raises:
        PipelineError: it is missing, no manifest, of another format version, or its fingerprint is not its content's;
            or the operating system did not let it be read.
    """
    file = path / "manifest.json"
    try:
        found = status(file)
        if found and not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            raise Fault(f"{file} is not a plain file")
        with reading(file):
            text = file.read_bytes()
    except OSError:
        raise Fault(f"{path} holds no feature set", "run `pipeline extract-features`, or `dvc pull` it") from None
    return parse_manifest(text, file)


def parse_manifest(text: bytes, file: Path) -> Manifest:
    """Checks the content of a manifest.json; `file` names it in errors.

    Raises:
        PipelineError: it is no manifest, of another format version, or its fingerprint is not its content's.
    """
    try:
        version = _Versioned.model_validate_json(text).format_version
        if version != FORMAT_VERSION:
            raise PipelineError(f"{file} has format version {version}, this program reads {FORMAT_VERSION}: update it")
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        reason = printable(f"{where[:_LONGEST]}: {first['msg'].removeprefix('Value error, ')[:_LONGEST]}")
        raise Fault(f"{file} is not a manifest ({reason})") from None
    if manifest.fingerprint != manifest.content.fingerprint:
        raise Fault(f"{file} was changed: its fingerprint is not that of its content")
    return manifest


def read_basis(path: Path, entry: FileEntry, fingerprint: str, layers: list[str]) -> Basis:
    """Reads basis.h5 of the set in folder `path`, finished or not.

    Raises:
        PipelineError: it is missing, corrupt, or another set's.
    """
    if wrong := entry.fault(path):
        raise wrong
    with opened(path / entry.file, fingerprint, "is not a basis.h5") as h5:
        return _basis(h5, layers)


def read_basis_file(file: Path, layers: list[str]) -> Basis:
    """Reads the basis.h5 of any set, to be shared.

    Raises:
        PipelineError: it is missing, no basis, or of other layers.
    """
    try:
        with open_to_read(file) as h5:
            if set(h5["layers"]) != set(layers):
                theirs = printable(", ".join(h5["layers"]))[:_LONGEST]
                raise PipelineError(f"{file} is a basis of {theirs}, not of {', '.join(layers)}")
            return _basis(h5, layers)
    except FileNotFoundError:
        raise PipelineError(f"{file} is missing: extract_features.basis names it; auto fits a basis") from None
    except MALFORMED as error:
        raise PipelineError(f"{file} is not a basis.h5 ({said(error)}): extract_features.basis names it") from None


def _basis(h5: h5py.File, names: list[str]) -> Basis:
    layers = {}
    for name in names:
        mean, components = (_float64(h5, f"layers/{name}/{field}", n) for field, n in (("mean", 1), ("components", 2)))
        explained = _float64(h5, f"layers/{name}/explained_variance", 1)
        if components.shape != (len(explained), len(mean)):
            raise ValueError(f"{name}: components of shape {components.shape}, not {(len(explained), len(mean))}")
        total = float(_float64(h5, f"layers/{name}/total_variance", 0))
        layers[name] = LayerBasis(mean, components, explained, total)
    basis = Basis(layers, _float64(h5, "mean", 1), _float64(h5, "std", 1))
    dims = sum(len(layer.components) for layer in layers.values())
    if basis.mean.shape != (dims,) or basis.std.shape != (dims,):
        raise ValueError(f"mean and std are not of {dims} dimensions")
    return basis


def _float64(h5: h5py.File, name: str, ndim: int) -> np.ndarray:
    """A dataset of finite numbers that stand in this file."""
    dataset = plain_dataset(h5, name, Path(h5.filename))
    if dataset.dtype != np.float64 or dataset.ndim != ndim:
        raise ValueError(f"{name} is {dataset.dtype} of shape {dataset.shape}, not float64 in {ndim} dimensions")
    values = dataset[()]
    if not np.isfinite(values).all():
        raise ValueError(f"{name} is not finite")
    return values


def _blocks(places: np.ndarray) -> list[np.ndarray]:
    return [places[start : start + _BLOCK] for start in range(0, len(places), _BLOCK)]


def _as_slice(positions: np.ndarray) -> np.ndarray | slice:
    """Consecutive positions as a slice, which is copied at memory speed."""
    first, count = int(positions[0]), len(positions)
    consecutive = positions[-1] - first == count - 1 and (np.diff(positions) == 1).all()
    return slice(first, first + count) if consecutive else positions
