"""Makes a feature set shard by shard, by one process or many, continuing what killed ones left.

Every file gets its own entry beside it, and every file its own lock (flock), held by whoever computes it and let go by
the system if that process dies. So no process needs to know of the others, and the folder may stand on any file system
with working locks that all of them see. All of them share one more lock, "in-use": a folder whose set was delivered is
cleared away only when nobody has it.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import provenance
from pipeline.errors import PipelineError
from pipeline.feature_store.reader import read_basis
from pipeline.feature_store.schema import (
    FIELDS,
    FORMAT_VERSION,
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

PLAN = "plan.json"  # says what is being made, for who lists the sets
DELIVERED = "delivered"  # marks a staging folder whose set stands in its place
_OVERHEAD = 16 * 1024  # bytes of a file besides its arrays' (HDF5's own structures), at most


class _Entry(BaseModel):
    """An entry on disk; a shard is projected on the basis whose hash it names."""

    model_config = ConfigDict(strict=True, extra="forbid")

    fingerprint: str
    basis_sha256: str
    entry: FileEntry


class FeatureSetWriter:
    """A set in the making, in a staging folder."""

    def __init__(self, staging: Path, plan: Plan, hardware: str) -> None:
        """Opens the folder; keeps every file of an earlier run that is still what its entry says.

        Args:
            staging: the folder; one per fingerprint and shard size.
            plan: the set to be made.
            hardware: what this process computes on, entered with each file that it writes.
        """
        self.path, self.plan = staging, plan
        self.fingerprint = plan.content.fingerprint
        self._hardware = hardware
        self._basis: FileEntry | None = None
        (staging / "locks").mkdir(parents=True, exist_ok=True)
        if status(staging / PLAN) is None:
            atomic.write_json(staging / PLAN, dataclasses.asdict(plan) | {"content": plan.content.model_dump()})

    def has_basis(self) -> bool:
        """Whether basis.h5 is there; reads the whole file the first time.

        Raises:
            SystemRefusal: the operating system did not let it be read.
        """
        if self._basis is None:
            found = _read_entry(self.path, "basis", self.fingerprint)
            if found and not found.entry.fault(self.path):
                self._basis = found.entry
        return self._basis is not None

    def has_shard(self, shard: int) -> bool:
        """Whether a shard is there, by its size, and is projected on our basis.

        Raises:
            SystemRefusal: the operating system did not let it be looked at.
        """
        return self.has_basis() and _shard_stands(self.path, shard, self.fingerprint, self._basis_entry.sha256)

    def forget_damaged(self, shards: Iterable[int]) -> None:
        """Reads every byte of these shards, and makes those missing that are not what their entries say.

        Raises:
            SystemRefusal: the operating system did not let one be read, which says nothing of its content.
        """
        for shard in shards:
            found = _read_entry(self.path, shard_name(shard), self.fingerprint)
            if found and (wrong := found.entry.fault(self.path)):
                log.warning("%s: computing it again", wrong.what)
                (self.path / f"{shard_name(shard)}.json").unlink(missing_ok=True)

    @property
    def missing_shards(self) -> list[int]:
        """The shards still to be computed, ascending."""
        return [shard for shard in range(self.plan.num_shards) if not self.has_shard(shard)]

    def basis(self) -> Basis:
        """Reads basis.h5."""
        return read_basis(self.path, self._basis_entry, self.fingerprint, list(self.plan.content.layers))

    def write_basis(self, basis: Basis, redone_in_float32: int = 0) -> None:
        """Writes basis.h5 and enters it; shards projected on another basis no longer count."""
        _write_basis(self.path / "basis.h5", basis, fingerprint=self.fingerprint)
        self._basis = self._enter("basis", rows=0, redone=redone_in_float32)

    def write_shard(self, shard: int, features: Features, redone_in_float32: int) -> None:
        """Writes a shard and enters it.

        Raises:
            PipelineError: a feature is not finite, or the disk is full.
        """
        for name in ("denoised", "prompted"):
            if not np.isfinite(getattr(features, name)).all():
                raise PipelineError(
                    f"shard {shard}: {name} features are not finite even in float32, or exceed float16's 65504: "
                    "the backbone does not work at this image_size and timestep"
                )
        name = shard_name(shard)
        with _new_file(self.path / f"{name}.h5", sum(array.nbytes for array in vars(features).values())) as h5:
            h5.attrs["fingerprint"] = self.fingerprint
            for field, dtype in FIELDS.items():
                h5.create_dataset(field, data=getattr(features, field).astype(dtype, copy=False))
            h5.create_dataset("crc32", data=features.crc32())
        self._enter(name, rows=len(features.index), redone=redone_in_float32)

    @contextlib.contextmanager
    def lock(self, name: str, wait: bool = True, check: Callable[[], None] = lambda: None) -> Iterator[bool]:
        """Holds the lock of this name, and says whether it is held.

        Args:
            name: what is to be made: "basis", "shard-00000", "set".
            wait: wait, saying so, while another process holds it; else do without.
            check: called while waiting; may raise to stop.

        Raises:
            PipelineError: the file system has no locks.
        """
        with locks.opened(self.path / "locks" / name) as lock:
            held = lock.acquire()
            if wait and not held:
                log.info("%s is being written by %s: waiting for it", name, lock.holder())
            while wait and not held:
                check()
                time.sleep(0.1)
                held = lock.acquire()
            yield held

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the folder from being removed while this process uses it, should another one publish the set."""
        name = f"in-use-{socket.gethostname()}-{os.getpid()}"
        with locks.held(self.path / "locks" / name, str(self.path)):
            yield

    def publish(self, target: Path) -> None:
        """Puts the complete set at `target`, whole or not at all, by hard links where the file system has them.

        The staging copy stays: should the caller be killed before it has noted the result, nothing is computed twice.
        """
        manifest = self._manifest()
        names = [entry.file for entry in manifest.files]
        with atomic.replace_folder(target) as incoming:
            for name in [*names, *(plot.name for plot in self.path.glob("*.svg"))]:
                _link_or_copy(self.path / name, incoming / name)
            atomic.write_json(incoming / "manifest.json", manifest.model_dump(mode="json"))
            atomic.sync_to_disk(incoming / "manifest.json")
        (self.path / DELIVERED).touch()

    def drop_delivered_neighbours(self) -> None:
        """Removes the staging folders of other sets that were published; those unfinished or in use stay.

        So do those that may not be read, such as another user's.
        """
        for other in self.path.parent.iterdir():
            with contextlib.suppress(OSError):
                if other != self.path and (other / DELIVERED).exists() and not _is_used(other):
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
            format_version=FORMAT_VERSION,
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

    def _enter(self, name: str, rows: int, redone: int) -> FileEntry:
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
    """How many shards of the set in the making are there, by their sizes; changes nothing and reads no file as a whole.

    Raises:
        SystemRefusal: the operating system did not let a file be looked at.
    """
    fingerprint = plan.content.fingerprint
    basis = _read_entry(staging, "basis", fingerprint)
    if not basis or basis.entry.size_fault(staging):
        return 0
    return sum(_shard_stands(staging, shard, fingerprint, basis.entry.sha256) for shard in range(plan.num_shards))


def _is_used(staging: Path) -> bool:
    """Return whether a process holds one of the folder's "in-use" locks."""
    with contextlib.ExitStack() as stack:
        files = (staging / "locks").glob("in-use-*")
        return not all(stack.enter_context(locks.opened(file)).acquire() for file in files)


def _shard_stands(staging: Path, shard: int, fingerprint: str, basis_sha256: str) -> bool:
    found = _read_entry(staging, shard_name(shard), fingerprint)
    return found is not None and found.basis_sha256 == basis_sha256 and not found.entry.size_fault(staging)


def _read_entry(staging: Path, name: str, fingerprint: str) -> _Entry | None:
    file = staging / f"{name}.json"
    try:
        with reading(file):
            found = _Entry.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None
    return found if found.fingerprint == fingerprint else None


def write_basis_file(file: Path, basis: Basis) -> None:
    """Writes a basis to be shared, of no set in particular; whole or not at all.

    Raises:
        PipelineError: the disk is full.
    """
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
    """A file to fill with `size` bytes of arrays; it appears whole or not at all."""
    with atomic.replace_file(file) as temporary:
        _reserve(temporary, size + _OVERHEAD)
        with h5py.File(temporary, "w") as h5:
            yield h5


def _reserve(file: Path, size: int) -> None:
    """Fails now if the disk has no room for `size` bytes: HDF5, failing while it writes, prints many pages."""
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        atomic.sync_to_disk(target)
