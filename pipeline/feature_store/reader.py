"""Read a feature set; damaged, missing or mismatched files are reported by name."""

import functools
import itertools
import operator
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from pydantic import BaseModel, StrictInt, ValidationError

from pipeline.errors import FeatureSetError
from pipeline.feature_store.int8 import Int8
from pipeline.feature_store.schema import (
    FIELDS,
    FORMAT_VERSIONS,
    Basis,
    Features,
    FileEntry,
    InvalidFeatureSet,
    LayerBasis,
    Manifest,
    positive_matches,
)
from pipeline.feature_store.shards import MALFORMED, MOST_CHARACTERS, Shards, opened, quoted
from pipeline.io.hdf5 import check_not_written, open_to_read, plain_dataset
from pipeline.io.system_errors import reading, status
from pipeline.text import first_few, printable

if TYPE_CHECKING:
    from pipeline.feature_store.torch_dataset import FeatureDataset

_BLOCK = 2 << 20  # bytes copied and checked at a time: they stay in the processor's cache between the two
_MOST_NAMED = 8  # missing shards that are named one by one
_THREADS = 4  # for a long read; copying and checksums release the GIL
_BATCH = 1024  # rows; training reads no larger batches
_LONG = _THREADS * _BLOCK  # bytes; for less, e.g. a training batch, threads would cost more than they gain


class _Versioned(BaseModel):
    """The start of a manifest of any format version; a newer one may have keys that are unknown here."""

    format_version: StrictInt


class FeatureSet:
    """A feature set, opened for reading: `len(features)`, `features[0]`, `features[2:10]`, `features[mask]`.

    An integer gives one image, any other index gives the images it selects, both as `Features`. Rows are checked
    against their checksums as they are read. It may be used by several threads, after a fork, and pickled.
    """

    def __init__(self, path: str | Path, unchecked: bool = False, partial: bool = False) -> None:
        """Open the set and check the sizes of its files.

        Args:
            path: The set's folder; `~` is the home folder.
            unchecked: Open it even if files are missing or damaged; reading such a file fails.
            partial: Allow missing shards, e.g. after a partial `dvc pull`. Call `require` to check that the rows you
                need are present.

        Raises:
            FeatureSetError: There is no set, it is incomplete, or a file is missing or has the wrong size.
        """
        self.path = path = Path(path).expanduser()
        self.manifest = read_manifest(path)
        self.shards = Shards(path, self.manifest)
        self._absent: dict[int, FileEntry] = {}
        self._int8: Int8 | None = None
        self._labels: np.ndarray | None = None
        if unchecked:
            return
        have, want = len(self.manifest.shards), self.manifest.plan.num_shards
        if have != want:
            problem = f"{path} is incomplete ({have} of {want} shards)"
            raise InvalidFeatureSet(problem, "Run `pipeline extract-features`")
        if partial:
            self._absent = {n: entry for n, entry in self.manifest.shards.items() if status(path / entry.file) is None}
        for entry in self._entries():
            if wrong_size := entry.size_problem(path):
                raise wrong_size

    @property
    def name(self) -> str:
        """Name of the set's folder."""
        return os.path.basename(os.path.abspath(self.path))

    @property
    def class_names(self) -> list[str]:
        """Class names by label."""
        return self.manifest.content.class_names

    @property
    def prompts(self) -> list[list[str]]:
        """Per prompt its texts, whose embeddings are averaged; `prompt_class` counts in this list."""
        return self.manifest.content.prompts

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in the order of their columns."""
        return list(self.manifest.content.layers)

    def columns(self, layer: str) -> slice:
        """Return the columns of one layer: `rows.denoised[..., features.columns("up_blocks.2")]`.

        Raises:
            FeatureSetError: The set has no such layer.
        """
        if layer not in self.manifest.content.layers:
            raise FeatureSetError(f"{self.name} has no layer {layer!r}. Use one of {', '.join(self.layers)}.")
        return slice(*self.manifest.content.layers[layer])

    def __repr__(self) -> str:
        """Return a summary of three lines."""
        content, made_by, classes = self.manifest.content, self.manifest.provenance, len(self.class_names)
        backbone, fingerprint = made_by.get("backbone", {}).get("name"), self.manifest.fingerprint[:12]
        layers = ", ".join(f"{name} [{start}:{stop}]" for name, (start, stop) in content.layers.items())
        noise = f"; {content.added_noise}" if content.added_noise else ""
        lines = (
            f"FeatureSet {self.name}: {len(self):,} images of {made_by.get('dataset')}, {classes} classes",
            f"  {content.num_dims} dims: {layers}; {content.prompts_per_image} prompts per image",
            f"  {backbone} at timestep {content.timestep}{noise}; fingerprint {fingerprint}",
        )
        return "\n".join(map(printable, lines))

    def __len__(self) -> int:
        """Return the number of images."""
        return self.manifest.rows

    def __getitem__(self, rows: Any) -> Features:
        """Return one image for an integer, or several for a slice, a list or array of integers, or a boolean mask.

        Raises:
            IndexError: A position is outside the set.
            FeatureSetError: As `read`.
        """
        try:
            one = operator.index(rows)
        except TypeError:
            every = range(len(self))
            index = np.array(every[rows], np.int64) if isinstance(rows, slice) else np.arange(len(self))[rows]
            if index.ndim != 1:
                raise IndexError(f"a feature set has one axis to index, not {index.ndim}") from None
            return self.read(index)
        if not -len(self) <= one < len(self):
            raise IndexError(f"{self.name} has images 0 to {len(self) - 1}, not {one}")
        return self.read(np.array([one % len(self)]))[0]

    def __iter__(self) -> Iterator[Features]:
        """Yield one image after another."""
        for rows in self.in_order():
            yield from (rows[place] for place in range(len(rows)))

    def in_order(self) -> Iterator[Features]:
        """Yield all images in order, some megabytes at a time, so that memory does not depend on the set's size.

        Sets of equal length, dimensions and prompts are divided equally.

        Raises:
            FeatureSetError: As `read`.
        """
        step = max(1, _BLOCK // self.manifest.content.read_row_bytes)
        for start in range(0, len(self), step):
            yield self._read(np.arange(start, min(len(self), start + step)), keep=False)

    def as_torch(self) -> "FeatureDataset":
        """Return the set as a dataset of dictionaries of tensors, for `torch.utils.data.DataLoader`."""
        from pipeline.feature_store.torch_dataset import FeatureDataset

        return FeatureDataset(self)

    def expect_labels(self, labels: np.ndarray) -> None:
        """Make later reads fail if a stored label differs from `labels`.

        Args:
            labels: int64 (rows,), those of the data set's training split.

        Raises:
            FeatureSetError: Their number differs from that of the set's rows.
        """
        if len(labels) != len(self):
            raise FeatureSetError(
                f"{self.path} holds {len(self)} samples, but the data set has {len(labels)}. Use features of this data "
                "set, or prepare the data set of these features."
            )
        self._labels = labels

    def require(self, index: np.ndarray) -> None:
        """Check that the shards of the samples `index`, int64 (n,), are present.

        Raises:
            FeatureSetError: Some are missing. The message names them, and the command that fetches them.
        """
        needed = set((np.asarray(index, np.int64) // self.manifest.rows_per_shard).tolist())
        missing = [entry.file for shard, entry in sorted(self._absent.items()) if shard in needed]
        if missing:
            here, few = os.path.relpath(self.path), len(missing) <= _MOST_NAMED
            wanted = " ".join(f"{here}/{file}" for file in missing) if few else here
            problem = f"lacks {first_few(missing, _MOST_NAMED if few else 1)} of the {len(needed)} shards"
            raise FeatureSetError(f"{self.path} {problem} that hold these samples. Run `dvc pull {wanted}`.")

    def basis(self) -> Basis:
        """Return the PCA basis, and the mean and standard deviation of the denoising representations."""
        content = self.manifest.content
        basis = read_basis(self.path, self.manifest.basis, self.manifest.fingerprint, list(content.layers))
        for name, (start, stop) in content.layers.items():
            if (count := len(basis.layers[name].components)) != stop - start:
                file = self.path / self.manifest.basis.file
                raise InvalidFeatureSet(f"{file} has {count} dimensions of {name} (its manifest says {stop - start})")
        return basis

    def read(self, index: np.ndarray) -> Features:
        """Return the rows of these samples, in this order.

        Args:
            index: int64 (n,), positions in the training split, 0 or more.

        Raises:
            FeatureSetError: A sample is not in the set, a row does not match its checksum, or its label is not the
                expected one.
        """
        index = np.asarray(index, np.int64)
        # The maps of a long read are not kept: it is hardly repeated, and may be of the whole set. A training batch is.
        return self._read(index, keep=len(index) <= _BATCH or not self._is_long(len(index)))

    def _is_long(self, rows: int) -> bool:
        return rows * self.manifest.content.row_bytes > _LONG

    def _rows_of(self, size: int) -> int:
        """Return how many rows, at least one, have `size` bytes."""
        return max(1, size // self.manifest.content.row_bytes)

    def _read(self, index: np.ndarray, keep: bool) -> Features:
        """Read the samples `index`, int64 (n,); whether to `keep` the maps of their shards."""
        if len(beyond := index[(index < 0) | (index >= len(self))]):
            raise FeatureSetError(f"{self.path} has no sample {beyond[0]}. Use samples 0 to {len(self) - 1}.")
        shard_of = index // self.manifest.rows_per_shard
        for shard in np.unique(shard_of).tolist():
            self.shards.check(shard)  # before allocating memory for the rows: a manifest may claim any number
        shapes = self.manifest.content.shapes(len(index))
        arrays = {name: np.empty(shapes[name], dtype) for name, dtype in self.manifest.content.datasets.items()}
        by_shard, step = np.argsort(shard_of, kind="stable"), self._rows_of(_BLOCK)
        blocks = [by_shard[start : start + step] for start in range(0, len(index), step)]
        fill = functools.partial(self._fill, arrays, index, keep)
        if self._is_long(len(index)):
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(fill, blocks))
        else:
            list(map(fill, blocks))
        rows = Features(**{name: arrays[name] for name in FIELDS})
        if self.manifest.content.storage == "float16":
            return rows
        self._int8 = self._int8 or Int8(self.basis())
        return replace(rows, denoised=self._int8.decode(rows.denoised), prompted=self._int8.decode(rows.prompted))

    def positive_prompts(self, rows: Features) -> np.ndarray:
        """Return which of its P prompts matches each image: int64 (n,), columns of `rows.prompted`.

        Raises:
            FeatureSetError: An image has no such prompt, or has it twice.
        """
        matching = positive_matches(self.manifest.content.positive, rows.prompt_class, rows.label)
        if len(wrong := np.flatnonzero(matching.sum(1) != 1)):
            sample = rows.index[wrong[0]]
            raise InvalidFeatureSet(f"{self.path}: sample {sample} does not have exactly one matching prompt")
        return matching.argmax(1)

    def verify_files(self) -> None:
        """Compare every file with its checksum in the manifest.

        Raises:
            FeatureSetError: Names the first file that differs.
        """
        for entry in self._entries():
            if problem := entry.content_problem(self.path):
                raise problem

    def _entries(self) -> list[FileEntry]:
        """Return the entries of the files that should be present."""
        shards = self.manifest.shards.items()
        return [self.manifest.basis, *(entry for shard, entry in shards if shard not in self._absent)]

    def _fill(self, arrays: dict[str, np.ndarray], index: np.ndarray, keep: bool, places: np.ndarray) -> None:
        """Copy the samples `index[places]`, those of a shard together, into `arrays` at `places`, and check them."""
        shard_of, local = np.divmod(index[places], self.manifest.rows_per_shard)
        edges = (np.flatnonzero(np.diff(shard_of)) + 1).tolist()
        for start, stop in itertools.pairwise([0, *edges, len(places)]):
            maps = self.shards.open(shard_of[start].item(), keep)
            into, source = _as_slice(places[start:stop]), _as_slice(local[start:stop])
            for name, array in arrays.items():
                array[into] = maps[name][source]
        at = slice(None) if len(places) == len(index) else _as_slice(places)
        self._check({name: array[at] for name, array in arrays.items()}, index[at])

    def _check(self, arrays: dict[str, np.ndarray], index: np.ndarray) -> None:
        """Raise InvalidFeatureSet if a row was corrupted, or is not that of its sample in `index`, int64 (n,)."""
        got = Features(**{name: arrays[name] for name in FIELDS})
        rows = index % self.manifest.rows_per_shard
        for wrong in np.flatnonzero(got.crc32() != arrays["crc32"])[:1]:
            raise self._damaged(index[wrong], f"row {rows[wrong]} is corrupt (checksum differs)")
        for wrong in np.flatnonzero(got.index != index)[:1]:
            problem = f"row {rows[wrong]} holds sample {got.index[wrong]}, not sample {index[wrong]}"
            raise self._damaged(index[wrong], problem)
        if self._labels is None:
            return
        for wrong in np.flatnonzero(got.label != (labels := self._labels[index]))[:1]:
            problem = f"sample {index[wrong]} has label {got.label[wrong]}, in the data set {labels[wrong]}"
            raise self._damaged(index[wrong], problem)

    def _damaged(self, sample: np.int64, problem: str) -> InvalidFeatureSet:
        """Return the error of a sample's row, unless a process is writing its file: its content is then unknown."""
        file = self.path / self.manifest.shards[int(sample // self.manifest.rows_per_shard)].file
        check_not_written(file)
        return InvalidFeatureSet(f"{file}: {problem}")


def read_manifest(path: str | Path) -> Manifest:
    """Read and check manifest.json of the set in folder `path`.

    Raises:
        FeatureSetError: It is missing, or as for `parse_manifest`.
    """
    path = Path(path).expanduser()
    file = path / "manifest.json"
    try:
        if (found := status(file)) and not stat.S_ISREG(found.st_mode):  # reading a pipe would block
            raise InvalidFeatureSet(f"{file} is not a regular file")
        with reading(file):
            text = file.read_bytes()
    except OSError:
        why = "the folder does not exist" if status(path) is None else "it has no manifest.json"
        remedy = "Run `pipeline extract-features`, or `dvc pull` it"
        raise InvalidFeatureSet(f"{path} holds no feature set ({why})", remedy) from None
    return parse_manifest(text, file)


def parse_manifest(text: bytes, file: Path) -> Manifest:
    """Check the content of a manifest.json; `file` names it in errors.

    Raises:
        FeatureSetError: It is not a manifest, of another format version, or its fingerprint does not match its content.
    """
    try:
        version = _Versioned.model_validate_json(text).format_version
        if version not in FORMAT_VERSIONS:
            *others, last = FORMAT_VERSIONS
            known = f"{', '.join(map(str, others))} and {last}"
            problem = f"{file} has format version {version}, but this program reads {known}"
            raise FeatureSetError(f"{problem}. Update the program.")
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where, problem = ".".join(map(str, first["loc"])) or "the file", first["msg"].removeprefix("Value error, ")
        reason = printable(f"{where[:MOST_CHARACTERS]}: {problem[:MOST_CHARACTERS]}")
        raise InvalidFeatureSet(f"{file} is not a manifest ({reason})") from None
    if manifest.fingerprint != manifest.content.fingerprint:
        raise InvalidFeatureSet(f"{file} was changed (its fingerprint does not match its content)")
    return manifest


def read_basis(path: Path, entry: FileEntry, fingerprint: str, layers: list[str]) -> Basis:
    """Read basis.h5 of the set in folder `path`, finished or not.

    Raises:
        FeatureSetError: It is missing, corrupt, or belongs to another set.
    """
    if problem := entry.content_problem(path):
        raise problem
    with opened(path / entry.file, fingerprint, "is not a basis.h5") as h5:
        return _basis(h5, layers)


def read_basis_file(file: Path, layers: list[str]) -> Basis:
    """Read the basis.h5 of any set, to be shared.

    Raises:
        FeatureSetError: It is missing, not a basis, or has other layers.
    """
    try:
        with open_to_read(file) as h5:
            if set(h5["layers"]) != set(layers):
                theirs = printable(", ".join(h5["layers"]))[:MOST_CHARACTERS]
                raise FeatureSetError(
                    f"{file} is a basis of {theirs}, not of {', '.join(layers)}. Set extract_features.basis to a basis "
                    "of these layers, or to auto to fit one."
                )
            return _basis(h5, layers)
    except FileNotFoundError:
        problem = "is missing"
    except MALFORMED as error:
        problem = f"is not a basis.h5 ({quoted(error)})"
    raise FeatureSetError(f"{file} {problem}. Set extract_features.basis to a basis file, or to auto to fit one.")


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
        raise ValueError(f"mean and std do not have {dims} dimensions")
    return basis


def _float64(h5: h5py.File, name: str, ndim: int) -> np.ndarray:
    """Return a dataset of finite numbers, stored in this file."""
    dataset = plain_dataset(h5, name, Path(h5.filename))
    if dataset.dtype != np.float64 or dataset.ndim != ndim:
        raise ValueError(f"{name} is {dataset.dtype} of shape {dataset.shape}, not float64 in {ndim} dimensions")
    values = dataset[()]
    if not np.isfinite(values).all():
        raise ValueError(f"{name} is not finite")
    return values


def _as_slice(positions: np.ndarray) -> np.ndarray | slice:
    """Return consecutive positions as a slice, because a slice is copied at memory speed."""
    first, count = int(positions[0]), len(positions)
    consecutive = count == 1 or (positions[-1] - first == count - 1 and (np.diff(positions) == 1).all())
    return slice(first, first + count) if consecutive else positions
