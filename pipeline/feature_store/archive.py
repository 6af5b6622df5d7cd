"""A feature set as one tar, for people without DVC: manifest first, then the files it names; equal sets, equal bytes.

An archive that is imported is taken for hostile. Nothing is unpacked by name: members must come as the manifest says,
plain files in one folder, each of the size and SHA-256 that the manifest gives, and are written under names of our own
beside the set's place; the set takes its place only after the whole of it was verified.
"""

import contextlib
import hashlib
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pipeline import atomic
from pipeline.errors import PipelineError
from pipeline.feature_store import verification
from pipeline.feature_store.reader import FeatureSet, parse_manifest, read_manifest
from pipeline.feature_store.schema import FileEntry, Manifest

_BLOCK = 1 << 20
_LARGEST_MANIFEST = 64 << 20  # bytes; that of a million-image set has a tenth of it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

Advance = Callable[[int], object]


def write(path: Path, archive: Path, advance: Advance = lambda size: None) -> None:
    """Writes the set in folder `path` into the tar `archive`, checking every byte on the way.

    Args:
        path: the set's folder, whose name the archive keeps.
        archive: the file; it appears whole or not at all.
        advance: is told the bytes of every part that is done.

    Raises:
        PipelineError: the set is incomplete or corrupt, or the disk is full.
    """
    manifest = FeatureSet(path).manifest
    with atomic.whole_or_not_at_all(archive) as temporary:
        with temporary.open("wb") as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
            _add(tar, f"{path.name}/manifest.json", path / "manifest.json", None, advance)
            for entry in manifest.files:
                _add(tar, f"{path.name}/{entry.file}", path / entry.file, entry, advance)
        atomic.sync(temporary)


def read(archive: Path, sets: Path, name: str | None = None, advance: Advance = lambda size: None) -> Path:
    """Puts the set in the tar `archive` into the folder `sets`, under its own name or another.

    Returns:
        The set's folder; where the same set stands already, nothing is changed.

    Raises:
        PipelineError: the archive is no feature set, is damaged or does what a feature set need not; another set stands
            there; the disk is full. Nothing is left behind then.
    """
    with _opened(archive) as tar:
        members = iter(tar)
        own_name, manifest = _read_manifest(archive, tar, members)
        name = name or own_name
        if not _NAME.fullmatch(name):
            raise PipelineError(f"{name!r} is no good name for a feature set: letters, digits, _ . and - only")
        target = sets / name
        if target.exists():
            return _already_there(target, manifest)
        sets.mkdir(parents=True, exist_ok=True)
        _check_room(sets, manifest)
        with atomic.folder_in_place_of(target) as incoming:
            for entry in manifest.files:
                _unpack(archive, tar, next(members, None), f"{own_name}/{entry.file}", entry, incoming, advance)
            if (extra := next(members, None)) is not None:
                raise _hostile(archive, f"it holds {extra.name!r}, which its manifest does not name")
            (incoming / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
            atomic.sync(incoming / "manifest.json")
            if wrong := verification.faults(incoming, full=True):
                raise PipelineError(f"{archive} holds a set that is not whole: {wrong[0]}")
    return target


def manifest_of(archive: Path) -> Manifest:
    """The manifest alone.

    Raises:
        PipelineError: the archive holds none.
    """
    with _opened(archive) as tar:
        return _read_manifest(archive, tar, iter(tar))[1]


def _add(tar: tarfile.TarFile, name: str, file: Path, entry: FileEntry | None, advance: Advance) -> None:
    member = tarfile.TarInfo(name)  # its times, owner and rights are those of no machine
    member.size = file.stat().st_size
    with file.open("rb") as stream:
        hashed = _Hashing(stream, advance)
        tar.addfile(member, hashed)  # type: ignore[arg-type]
    if entry and hashed.digest() != entry.sha256:
        raise PipelineError(f"{file} is corrupt (SHA-256 differs from its manifest): nothing was exported")


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, stream: IO[bytes], advance: Advance) -> None:
        self._stream, self._advance, self._hash = stream, advance, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._hash.update(data)
        self._advance(len(data))
        return data

    def digest(self) -> str:
        return self._hash.hexdigest()


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive, mode="r|") as tar:  # in order, uncompressed: nothing can unfold to more than it is
            yield tar
    except FileNotFoundError:
        raise PipelineError(f"{archive} is missing") from None
    except (tarfile.TarError, EOFError, IsADirectoryError) as error:
        raise PipelineError(
            f"{archive} is no whole tar of `pipeline features export` ({error}): get it again"
        ) from None


def _read_manifest(archive: Path, tar: tarfile.TarFile, members: Iterator[tarfile.TarInfo]) -> tuple[str, Manifest]:
    """The name of the archive's folder, and its manifest, which must come first."""
    first = next(members, None)
    folder, _, file = first.name.partition("/") if first else ("", "", "")
    if not first or file != "manifest.json" or not _NAME.fullmatch(folder):
        raise PipelineError(f"{archive} is not a tar of `pipeline features export`: its manifest does not come first")
    _check_plain(archive, first)
    if first.size > _LARGEST_MANIFEST:
        raise _hostile(archive, f"its manifest has {first.size} bytes")
    return folder, parse_manifest(_content(archive, tar, first).read(), Path(f"{archive}:{first.name}"))


def _unpack(
    archive: Path,
    tar: tarfile.TarFile,
    member: tarfile.TarInfo | None,
    name: str,
    entry: FileEntry,
    folder: Path,
    advance: Advance,
) -> None:
    """One file, checked against its entry."""
    if member is None:
        raise PipelineError(f"{archive} is cut short: {name} is missing; get it again")
    if member.name != name:
        raise _hostile(archive, f"it holds {member.name!r} where its manifest says {name}")
    _check_plain(archive, member)
    if member.size != entry.bytes:
        raise PipelineError(f"{archive}: {name} has {member.size} bytes, its manifest says {entry.bytes}")
    source = _content(archive, tar, member)
    digest = hashlib.sha256()
    with (folder / entry.file).open("wb") as stream:
        while block := source.read(_BLOCK):
            digest.update(block)
            stream.write(block)
            advance(len(block))
    if digest.hexdigest() != entry.sha256:
        raise PipelineError(f"{archive}: {name} is corrupt (SHA-256 differs from its manifest): get it again")
    atomic.sync(folder / entry.file)


def _content(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(member)
    if stream is None:
        raise _hostile(archive, f"{member.name} is no plain file")
    return stream


def _check_plain(archive: Path, member: tarfile.TarInfo) -> None:
    if not member.isreg() or member.issparse():
        raise _hostile(archive, f"{member.name} is a link, a device or otherwise no plain file")


def _check_room(sets: Path, manifest: Manifest) -> None:
    needed, free = sum(entry.bytes for entry in manifest.files), shutil.disk_usage(sets).free
    if needed > free:
        raise PipelineError(f"the set needs {needed / 1e9:.2f} GB, {sets} has room for {free / 1e9:.2f}: make room")


def _already_there(target: Path, manifest: Manifest) -> Path:
    found = read_manifest(target)
    if found.fingerprint == manifest.fingerprint and not verification.faults(target, full=False):
        return target
    raise PipelineError(
        f"{target} holds another feature set ({found.fingerprint[:12]}, the archive's is {manifest.fingerprint[:12]}) "
        "or is damaged: move it away, or import under another name with --as"
    )


def _hostile(archive: Path, what: str) -> PipelineError:
    return PipelineError(f"{archive} is refused: {what}. `pipeline features export` does not write such archives")
