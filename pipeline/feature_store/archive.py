"""A feature set as one tar, for people without DVC: manifest first, then the files it names; equal sets, equal bytes.

An archive that is imported is taken for hostile. Nothing is unpacked by name: members must come as the manifest says,
plain files in one folder, each of the size and SHA-256 that the manifest gives, and are written under names of our own
beside the set's place; the set takes its place only after the whole of it was verified. Of the tar format we read the
header that we write, a block of 512 bytes, by the standard library; none of its extensions (long names, pax records,
sparse files), which read before they are asked.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import PipelineError
from pipeline.feature_store import verification
from pipeline.feature_store.reader import FeatureSet, parse_manifest, read_manifest
from pipeline.feature_store.schema import Fault, FileEntry, Manifest
from pipeline.io import atomic, locks
from pipeline.io.hdf5 import bytes_of
from pipeline.io.system_errors import SystemRefusal, reading
from pipeline.text import printable, size

_BLOCK = 1 << 20
_LARGEST_MANIFEST = 64 << 20  # bytes; that of a million-image set has a tenth of it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{,79}")  # no dots: "x.tmp", "x.old" and "x.tar" mean something else
_ELSEWHERE = "move it away, or import under another name with --as"

Advance = Callable[[int], object]


def write(path: Path, archive: Path, advance: Advance = lambda size: None) -> None:
    """Writes the set in folder `path` into the tar `archive`, checking every byte on the way.

    Args:
        path: the set's folder, whose name the archive keeps.
        archive: the file; it appears whole or not at all.
        advance: is told the bytes of every part that is done.

    Raises:
        PipelineError: the set is incomplete or corrupt, its name is not one for a set, another process writes the
            archive, or the disk is full.
    """
    name = _checked_name(Path(os.path.abspath(path)).name)
    manifest = FeatureSet(path).manifest
    with _alone(archive), atomic.replace_file(archive) as temporary:
        with temporary.open("wb") as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
            _add(tar, f"{name}/manifest.json", path / "manifest.json", None, advance)
            for entry in manifest.files:
                _add(tar, f"{name}/{entry.file}", path / entry.file, entry, advance)
        atomic.sync_to_disk(temporary)


def read(archive: Path, sets: Path, name: str | None = None, advance: Advance = lambda size: None) -> Path:
    """Puts the set in the tar `archive` into the folder `sets`, under its own name or another.

    Returns:
        The set's folder; where the same set stands already, nothing is changed.

    Raises:
        PipelineError: the archive is no feature set, is damaged or does what a feature set need not; another set stands
            there; the disk is full. Nothing is left behind then.
    """
    with _opened(archive) as tar:
        own_name, manifest = tar.manifest()
        target = sets / _checked_name(own_name if name is None else name)
        if os.path.lexists(target):
            _require_same(target, manifest)
            return target
        sets.mkdir(parents=True, exist_ok=True)
        _check_room(sets, manifest)
        with atomic.replace_folder(target) as incoming:
            for entry in manifest.files:
                tar.unpack(f"{own_name}/{entry.file}", entry, incoming / entry.file, advance)
            tar.end()
            (incoming / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            atomic.sync_to_disk(incoming / "manifest.json")
            for fault in verification.faults(incoming, full=True):
                if isinstance(fault, SystemRefusal):
                    raise fault
                raise PipelineError(f"{_what(fault).replace(str(incoming), str(archive))}: get it again")
            if os.path.lexists(target):  # it appeared meanwhile
                _require_same(target, manifest)
    return target


def manifest_of(archive: Path) -> Manifest:
    """The manifest alone.

    Raises:
        PipelineError: the archive holds none.
    """
    with _opened(archive) as tar:
        return tar.manifest()[1]


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise PipelineError(
            f"{name!r} is no name for a feature set: it takes 1 to 80 letters, digits, _ and -, the first a letter or "
            "digit; --as gives another to what is imported, renaming its folder to what is exported"
        )
    return name


@contextlib.contextmanager
def _alone(archive: Path) -> Iterator[None]:
    """Hold the lock of the archive's temporary file, which becomes the archive: no lock file stays behind."""
    lock = locks.Lock(archive.with_name(f"{archive.name}.tmp"))
    if not lock.acquire():
        raise PipelineError(f"another process is writing {archive}: wait until it has ended")
    try:
        yield
    finally:
        lock.release()


def _add(tar: tarfile.TarFile, name: str, file: Path, entry: FileEntry | None, advance: Advance) -> None:
    member = tarfile.TarInfo(name)  # its times, owner and rights are those of no machine
    with bytes_of(file) as stream:
        member.size = os.fstat(stream.fileno()).st_size
        hashed = _Hashing(stream, file, advance)
        tar.addfile(member, hashed)  # type: ignore[arg-type]
        if entry and hashed.digest() != entry.sha256:
            raise PipelineError(f"{file} is corrupt (SHA-256 differs from its manifest): nothing was exported")


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, stream: IO[bytes], file: Path, advance: Advance) -> None:
        self._stream, self._file, self._advance, self._hash = stream, file, advance, hashlib.sha256()

    def read(self, size: int) -> bytes:
        with reading(self._file):
            data = self._stream.read(size)
        self._hash.update(data)
        self._advance(len(data))
        return data

    def digest(self) -> str:
        return self._hash.hexdigest()


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator["_Archive"]:
    try:
        with reading(archive):
            stream = archive.open("rb")
    except FileNotFoundError:
        raise PipelineError(f"{archive} is missing") from None
    except OSError as error:
        raise PipelineError(f"{archive} is not a file ({error.strerror}): name a tar of `features export`") from None
    with stream:
        yield _Archive(archive, stream)


class _Archive:
    """A tar, read once from its beginning; uncompressed, so that nothing can unfold to more than it is."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path, self._stream = path, stream

    def manifest(self) -> tuple[str, Manifest]:
        """The name of the archive's folder, and its manifest, which must come first."""
        member = self._next()
        folder, _, file = member.name.partition("/") if member else ("", "", "")
        if not member or file != "manifest.json" or not _NAME.fullmatch(folder):
            raise PipelineError(
                f"{self._path} is not a tar of `pipeline features export`: its manifest does not come first"
            )
        if member.size > _LARGEST_MANIFEST:
            raise self._hostile(f"its manifest has {member.size} bytes")
        try:
            return folder, parse_manifest(b"".join(self._content(member)), self._path / member.name)
        except Fault as fault:
            raise PipelineError(f"{fault.what}: get it again") from None

    def unpack(self, name: str, entry: FileEntry, file: Path, advance: Advance) -> None:
        """Writes the next member, which must be that of `name`, to `file`, checked against its entry."""
        member = self._next()
        if member is None:
            raise self._cut_short(name)
        if member.name != name:
            raise self._hostile(f"it holds {printable(member.name)} where its manifest says {name}")
        if member.size != entry.bytes:
            raise PipelineError(f"{self._path}: {name} has {member.size} bytes, its manifest says {entry.bytes}")
        digest = hashlib.sha256()
        with file.open("wb") as stream:
            for block in self._content(member):
                digest.update(block)
                stream.write(block)
                advance(len(block))
        if digest.hexdigest() != entry.sha256:
            raise PipelineError(f"{self._path}: {name} is corrupt (SHA-256 differs from its manifest): get it again")
        atomic.sync_to_disk(file)

    def end(self) -> None:
        """Nothing may come any more."""
        if (extra := self._next()) is not None:
            raise self._hostile(f"it holds {printable(extra.name)}, which its manifest does not name")

    def _next(self) -> tarfile.TarInfo | None:
        """The next member's header; None at the end, which is a block of zeros."""
        block = self._read(tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            return None
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise PipelineError(
                f"{self._path} is no whole tar of `pipeline features export` ({error}): get it again"
            ) from None
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.size < 0:
            raise self._hostile(f"{printable(member.name)} is a link, a device or otherwise no plain file")
        return member

    def _content(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        left = member.size
        while left:
            block = self._read(min(_BLOCK, left))
            if not block:
                raise self._cut_short(member.name)
            left -= len(block)
            yield block
        self._read(-member.size % tarfile.BLOCKSIZE)

    def _read(self, size: int) -> bytes:
        with reading(self._path):
            return self._stream.read(size)

    def _cut_short(self, name: str) -> PipelineError:
        return PipelineError(f"{self._path} is cut short in or before {name}: get it again")

    def _hostile(self, what: str) -> PipelineError:
        return PipelineError(
            f"{self._path} is refused: {what}. `pipeline features export` does not write such archives"
        )


def _check_room(sets: Path, manifest: Manifest) -> None:
    needed, free = sum(entry.bytes for entry in manifest.files), shutil.disk_usage(sets).free
    if needed > free:
        raise PipelineError(f"the set needs {size(needed)}, {sets} has room for {size(free)}: make room")


def _require_same(target: Path, manifest: Manifest) -> None:
    """Passes over a whole set of the same fingerprint; refuses all else that may stand there."""
    for error in verification.faults(target, full=False):
        if isinstance(error, SystemRefusal):
            raise error
        raise PipelineError(f"{target} is there and not whole ({_what(error)}): {_ELSEWHERE}")
    found = read_manifest(target).fingerprint
    if found != manifest.fingerprint:
        theirs = manifest.fingerprint[:12]
        raise PipelineError(
            f"{target} holds another feature set ({found[:12]}, the archive's is {theirs}): {_ELSEWHERE}"
        )


def _what(error: PipelineError) -> str:
    """What is wrong, without a remedy that is none here."""
    return error.what if isinstance(error, Fault) else str(error)
