"""Write a feature set shard by shard, by one or many processes, and resume after interruptions.

Each file has an entry beside it and a lock of its own, which its writer holds and the operating system frees if that
process dies. So the processes need not know each other, and the folder may be on any file system that all of them share
and that has file locks. A further lock per process, "in-use", keeps the folder from being removed after its set was
published.
"""

import contextlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
from pydantic import BaseModel, ValidationError

from pipeline import provenance
from pipeline.errors import DataError
from pipeline.feature_store.int8 import Int8
from pipeline.feature_store.reader import read_basis
from pipeline.feature_store.schema import (
    FIELDS,
    Basis,
    Features,
    FileEntry,
    Manifest,
    Plan,
    shard_name,
)
from pipeline.io import atomic, locks
from pipeline.io.system_errors import reading, status

log = logging.getLogger(__name__)

PLAN = "plan.json"
"""The plan of the set in a staging folder, for `pipeline features list`."""

PUBLISHED = "published"
"""Marks a staging folder whose set has been published."""

_OVERHEAD = 16 * 1024  # upper bound of a file's bytes besides its arrays (HDF5's own structures)


class _Entry(BaseModel, strict=True, extra="forbid"):
    """The entry of a file on disk, with the hash of the basis that its features were projected on."""

    fingerprint: str
    basis_sha256: str
    entry: FileEntry


class FeatureSetWriter:
    """An unfinished set, in a staging folder."""

    def __init__(self, staging: Path, plan: Plan, hardware: str) -> None:
        """Open the folder. Files of an earlier run that match their entries are kept.

        Args:
            staging: The folder; one per fingerprint and shard size.
            plan: The set to write.
            hardware: The processor or GPU of this process, for the entries of the files that it writes.
        """
        self.path, self.plan, self._hardware = staging, plan, hardware
        self.fingerprint = plan.content.fingerprint
        self._basis: FileEntry | None = None
        self._int8: Int8 | None = None  # the scales of the basis
        (staging / "locks").mkdir(parents=True, exist_ok=True)
        if status(staging / PLAN) is None:
            with self.lock("plan"):  # the processes of one extraction start at the same time
                if status(staging / PLAN) is None:
                    atomic.write_json(staging / PLAN, asdict(plan) | {"content": plan.content.model_dump()})

    def has_basis(self) -> bool:
        """Return whether basis.h5 is finished; reads every byte of it the first time."""
        if self._basis is None:
            found = _read_entry(self.path, "basis", self.fingerprint)
            if found and not found.entry.content_problem(self.path):
                self._basis = found.entry
        return self._basis is not None

    def has_shard(self, shard: int) -> bool:
        """Return whether a shard is finished, by its size, and was projected on this set's basis."""
        return self.has_basis() and _shard_is_finished(self.path, shard, self.fingerprint, self._basis_entry.sha256)

    def forget_damaged(self, shards: Iterable[int]) -> None:
        """Read every byte of these shards, and discard those that do not match their entries."""
        for shard in shards:
            found = _read_entry(self.path, shard_name(shard), self.fingerprint)
            if found and (damage := found.entry.content_problem(self.path)):
                log.warning("%s. Recomputing it.", damage.problem)
                (self.path / f"{shard_name(shard)}.json").unlink(missing_ok=True)

    @property
    def missing_shards(self) -> list[int]:
        """The shards that are not finished, ascending."""
        return [shard for shard in range(self.plan.num_shards) if not self.has_shard(shard)]

    def basis(self) -> Basis:
        """Read basis.h5."""
        return read_basis(self.path, self._basis_entry, self.fingerprint, list(self.plan.content.layers))

    def write_basis(self, basis: Basis, redone_in_float32: int = 0) -> None:
        """Write basis.h5 and its entry; shards that were projected on another basis become unfinished."""
        _write_basis(self.path / "basis.h5", basis, fingerprint=self.fingerprint)
        self._basis = self._add_entry("basis", rows=0, redone=redone_in_float32)
        self._int8 = None

    def write_shard(self, shard: int, features: Features, redone_in_float32: int) -> None:
        """Write a shard and its entry.

        Raises:
            DataError: A feature is not finite.
        """
        for name in ("denoised", "prompted"):
            if not np.isfinite(getattr(features, name)).all():
                raise DataError(
                    f"The {name} features of shard {shard} are not finite even in float32, or exceed float16's 65504. "
                    "The backbone does not work at this image_size and timestep. Choose others."
                )
        stored, types = self._stored(features), self.plan.content.datasets
        name = shard_name(shard)
        with _new_file(self.path / f"{name}.h5", sum(array.nbytes for array in vars(stored).values())) as h5:
            h5.attrs["fingerprint"] = self.fingerprint
            for field in FIELDS:
                h5.create_dataset(field, data=getattr(stored, field).astype(types[field], copy=False))
            h5.create_dataset("crc32", data=stored.crc32())
        self._add_entry(name, rows=len(features.index), redone=redone_in_float32)

    def _stored(self, features: Features) -> Features:
        if self.plan.content.storage == "float16":
            return features
        self._int8 = self._int8 or Int8(self.basis())
        encoded = {name: self._int8.encode(getattr(features, name)) for name in ("denoised", "prompted")}
        return replace(features, **encoded)

    @contextlib.contextmanager
    def lock(self, name: str, wait: bool = True, check: Callable[[], None] = lambda: None) -> Iterator[bool]:
        """Hold the lock of this name during the block, and yield whether it is held.

        Args:
            name: What is being written: "basis", "shard-00000", "set".
            wait: Wait, with a log line, while another process holds it; otherwise yield False.
            check: Called while waiting; may raise to stop.
        """
        with locks.opened(self.path / "locks" / name) as lock:
            held = lock.acquire()
            if wait and not held:
                log.info("%s is being written by %s. Waiting for it.", name, lock.holder())
                while not held:
                    check()
                    time.sleep(0.1)
                    held = lock.acquire()
            yield held

    def agree_on_batch(self, measure: Callable[[], int], check: Callable[[], None] = lambda: None) -> int:
        """Return the batch size that the set's first process on this kind of GPU measured, so that kernels agree."""
        file = self.path / "batch.json"
        with self.lock("batch", check=check):
            sizes: dict[str, int] = {}
            with contextlib.suppress(OSError, ValueError):
                found = json.loads(file.read_bytes())
                sizes = {str(name): size for name, size in dict(found).items() if isinstance(size, int) and size > 0}
            if self._hardware not in sizes:
                sizes[self._hardware] = measure()
                atomic.write_json(file, sizes)
            return sizes[self._hardware]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the folder from being removed while this process uses it, should another one publish the set."""
        name = f"in-use-{socket.gethostname()}-{os.getpid()}"
        with locks.held(self.path / "locks" / name, str(self.path)):
            yield

    def publish(self, target: Path) -> None:
        """Publish the complete set at `target` atomically, with hard links where the file system supports them.

        The staging copy stays, so that nothing is recomputed if the caller is killed before it has recorded the result.
        """
        manifest = self._manifest()
        names = [entry.file for entry in manifest.files]
        with atomic.replace_folder(target) as incoming:
            for name in [*names, *(plot.name for plot in self.path.glob("*.svg"))]:
                _link_or_copy(self.path / name, incoming / name)
            atomic.write_json(incoming / "manifest.json", manifest.model_dump(mode="json"))
        (self.path / PUBLISHED).touch()

    def remove_published_siblings(self) -> None:
        """Remove the staging folders of other published sets; unfinished, used or unreadable folders stay."""
        for other in self.path.parent.iterdir():
            with contextlib.suppress(OSError):
                if other != self.path and (other / PUBLISHED).exists() and not _is_used(other):
                    shutil.rmtree(other, ignore_errors=True)

    @property
    def _basis_entry(self) -> FileEntry:
        assert self._basis
        return self._basis

    def _manifest(self) -> Manifest:
        entries = {n: _read_entry(self.path, shard_name(n), self.fingerprint) for n in range(self.plan.num_shards)}
        shards = {shard: found.entry for shard, found in entries.items() if found}
        hardware = sorted({entry.hardware for entry in [self._basis_entry, *shards.values()]})
        content = self.plan.content
        return Manifest(
            format_version=content.format_version,
            fingerprint=self.fingerprint,
            content=content,
            rows=self.plan.rows,
            rows_per_shard=self.plan.rows_per_shard,
            prompts_per_image=content.prompts_per_image,
            redone_in_float32=sum(entry.redone_in_float32 for entry in shards.values()),
            basis=self._basis_entry,
            shards=shards,
            provenance=self.plan.provenance | {"hardware": hardware},
        )

    def _add_entry(self, name: str, rows: int, redone: int) -> FileEntry:
        path = self.path / f"{name}.h5"
        entry = FileEntry(
            file=path.name,
            rows=rows,
            bytes=path.stat().st_size,
            sha256=provenance.file_sha256(path),
            redone_in_float32=redone,
            hardware=self._hardware,
        )
        basis_sha256 = entry.sha256 if name == "basis" else self._basis_entry.sha256
        found = _Entry(fingerprint=self.fingerprint, basis_sha256=basis_sha256, entry=entry)
        atomic.write_json(self.path / f"{name}.json", found.model_dump(mode="json"))
        return entry


def count_finished(staging: Path, plan: Plan) -> int:
    """Return how many shards of an unfinished set are finished, by their sizes. Changes and hashes nothing."""
    fingerprint = plan.content.fingerprint
    basis = _read_entry(staging, "basis", fingerprint)
    if not basis or basis.entry.size_problem(staging):
        return 0
    return sum(_shard_is_finished(staging, shard, fingerprint, basis.entry.sha256) for shard in range(plan.num_shards))


def _is_used(staging: Path) -> bool:
    """Return whether a process holds one of the folder's "in-use" locks."""
    with contextlib.ExitStack() as stack:
        files = (staging / "locks").glob("in-use-*")
        return not all(stack.enter_context(locks.opened(file)).acquire() for file in files)


def _shard_is_finished(staging: Path, shard: int, fingerprint: str, basis_sha256: str) -> bool:
    found = _read_entry(staging, shard_name(shard), fingerprint)
    return found is not None and found.basis_sha256 == basis_sha256 and not found.entry.size_problem(staging)


def _read_entry(staging: Path, name: str, fingerprint: str) -> _Entry | None:
    file = staging / f"{name}.json"
    try:
        with reading(file):
            found = _Entry.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None
    return found if found.fingerprint == fingerprint else None


def write_basis_file(file: Path, basis: Basis) -> None:
    """Write a basis to be shared, atomically, without the fingerprint of a set."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_basis(file, basis)


def _write_basis(file: Path, basis: Basis, **attributes: str) -> None:
    arrays = [basis.mean, basis.std, *(value for layer in basis.layers.values() for value in vars(layer).values())]
    with _new_file(file, sum(np.asarray(array).nbytes for array in arrays)) as h5:
        h5.attrs.update(attributes)
        h5.create_dataset("mean", data=basis.mean)
        h5.create_dataset("std", data=basis.std)
        for name, layer in basis.layers.items():
            group = h5.create_group(f"layers/{name}")
            for field, value in vars(layer).items():
                group.create_dataset(field, data=value)


@contextlib.contextmanager
def _new_file(file: Path, size: int) -> Iterator[h5py.File]:
    """Yield a new HDF5 file for `size` bytes of arrays, which appears atomically."""
    with atomic.replace_file(file) as temporary:
        with temporary.open("wb") as stream:
            if hasattr(os, "posix_fallocate"):  # a full disk fails here: in a later write, HDF5 prints pages of errors
                os.posix_fallocate(stream.fileno(), 0, size + _OVERHEAD)
        with h5py.File(temporary, "w") as h5:
            yield h5


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        atomic.sync_to_disk(target)
