"""Export a feature set as one tar file, and import it, for people without DVC. Equal sets give equal bytes.

Imported archives are treated as untrusted. Members must come in the manifest's order: the manifest, then the files that
it names, as regular files of the sizes that it gives. They are unpacked beside the set's final place, without
compression, attributes or any extension of the tar format, and moved there only after a full verification.
"""

import contextlib
import hashlib
import io
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import FeatureSetError, PipelineError
from pipeline.feature_store import noise, verification
from pipeline.feature_store.reader import FeatureSet, parse_manifest, read_manifest
from pipeline.feature_store.schema import FileEntry, InvalidFeatureSet, Manifest
from pipeline.io import atomic, locks
from pipeline.io.compression import LENGTH, compression_of
from pipeline.io.hdf5 import bytes_of
from pipeline.io.system_errors import SystemRefusal, reading
from pipeline.text import printable, size

_LARGEST_MANIFEST = 64 << 20  # bytes; that of a million images has a tenth of it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{,79}")  # no dots: "x.tmp", "x.old" and "x.tar" mean something else
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_ELSEWHERE = "Move it away, or import under another name with --as."
log = logging.getLogger(__name__)

Advance = Callable[[int], object]


def write(path: Path, archive: Path, advance: Advance = lambda size: None, noise_scale: float | None = None) -> None:
    """Export the set in folder `path`, whose name the archive keeps, atomically, and check every byte on the way.

    With `noise_scale`, export a copy with noise (`noise.write_copy`). `advance` is called with the number of bytes done
    since the last call; with noise, every byte is done twice. Raise PipelineError if the set is incomplete, corrupt or
    has an invalid name, if it has noise already or the scale is invalid, or if the archive cannot be written. Of the
    files at `archive`, only an empty one and an earlier export are replaced, the latter not with noise.
    """
    name = _checked_name(Path(os.path.abspath(path)).name)
    features = FeatureSet(path)
    with (
        _locked(archive),
        atomic.replace_file(archive) as temporary,
        _shared(features, noise_scale, archive, advance) as shared,
        temporary.open("wb") as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        _add(tar, f"{name}/manifest.json", shared.path / "manifest.json", None, advance)
        for entry in shared.manifest.files:
            _add(tar, f"{name}/{entry.file}", shared.path / entry.file, entry, advance)


def read(archive: Path, sets: Path, name: str | None = None, advance: Advance = lambda size: None) -> Path:
    """Import the set in the tar `archive` into the folder `sets`, under `name` or its own, and return the set's folder.

    `advance` is called with the size of every file that was unpacked. If the same set is there already, nothing is
    changed. Raise PipelineError if the archive is damaged or hostile, another set is in its place, or the disk is full;
    nothing is left behind then.
    """
    with _opened(archive) as (tar, own_name, manifest):
        target = sets / _checked_name(own_name if name is None else name)
        if os.path.lexists(target):
            _require_same(target, manifest)
            log.warning("%s holds this set already. The rest of %s was not checked", target, archive)
            return target
        sets.mkdir(parents=True, exist_ok=True)
        needed, free = sum(entry.bytes for entry in manifest.files), shutil.disk_usage(sets).free
        if needed > free:
            problem = f"The set needs {size(needed)}, but {sets} has {size(free)} free"
            raise FeatureSetError(f"{problem}. Make room on the disk.")
        with atomic.replace_folder(target) as incoming:
            _unpack(tar, own_name, manifest, archive, incoming, advance)
            atomic.write_text(incoming / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
            for error in verification.problems(incoming, full=True):
                if isinstance(error, SystemRefusal):
                    raise error
                raise FeatureSetError(f"{_problem(error).replace(str(incoming), str(archive))}. Get it again.")
            if os.path.lexists(target):  # another process put it there meanwhile
                _require_same(target, manifest)
    return target


def manifest_of(archive: Path) -> Manifest:
    """Read the manifest alone; raises what `read` raises."""
    with _opened(archive) as (_, _, manifest):
        return manifest


class _RegularFile(tarfile.TarInfo):
    """A member that must be a regular file."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        # tarfile calls this for every header, before it follows an extension (long names, pax records, sparse files):
        # in a hostile archive those are nested thousands deep, or claim gigabytes of memory.
        archive, name = Path(os.fsdecode(tar.fileobj.name)), printable(self.name)  # type: ignore[union-attr,attr-defined]
        if self.isdir() or self.type in _EXTENSIONS:  # as other programs write them from a folder
            other = f"no folders ({name} is one)" if self.isdir() else f"no extended headers ({name} is one)"
            raise FeatureSetError(
                f"{archive} is not a tar of `pipeline features export`, which has {other}. Ask for one."
            )
        if self.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or self.size < 0:
            raise _rejected(archive, f"{name} is a link, a device or otherwise not a regular file")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


class _Source(io.FileIO):
    """An archive that is being read; errors of the operating system name it."""

    def read(self, size: int | None = -1) -> bytes:
        """Read up to `size` bytes."""
        with reading(Path(os.fsdecode(self.name))):
            return super().read(-1 if size is None else size)


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tuple[tarfile.TarFile, str, Manifest]]:
    """Yield the open archive, the name of the folder in it, and its manifest."""
    try:
        with reading(archive):
            source = _Source(str(archive))
    except OSError as error:
        why = f"{archive} cannot be opened ({error.strerror})"
        raise FeatureSetError(f"{why}. Give the path of a tar of `pipeline features export`.") from None
    with source:
        try:
            with tarfile.open(fileobj=source, mode="r:", tarinfo=_RegularFile, encoding="utf-8") as tar:
                yield tar, *_manifest(tar, archive)
        except tarfile.TarError as error:
            source.seek(0)
            if kind := compression_of(source.read(LENGTH)):
                problem = f"{archive} is compressed ({kind})"
                raise FeatureSetError(f"{problem}. Decompress it, then import the tar.") from None
            problem = f"{archive} is not a complete tar of `pipeline features export` ({error})"
            raise FeatureSetError(f"{problem}. Get it again.") from None


def _manifest(tar: tarfile.TarFile, archive: Path) -> tuple[str, Manifest]:
    """Return the name of the archive's folder, and its manifest, which must come first."""
    member = tar.next()
    folder, _, file = member.name.partition("/") if member else ("", "", "")
    if not member or file != "manifest.json" or not _NAME.fullmatch(folder):
        problem = "the manifest is not its first file"
        raise FeatureSetError(f"{archive} is not a tar of `pipeline features export` ({problem}). Get it again.")
    if member.size > _LARGEST_MANIFEST:
        raise _rejected(archive, f"its manifest has {member.size} bytes")
    content = tar.extractfile(member)
    assert content is not None  # it is a regular file
    try:
        return folder, parse_manifest(content.read(), archive / member.name)
    except InvalidFeatureSet as error:
        raise FeatureSetError(f"{error.problem}. Get it again.") from None


def _unpack(
    tar: tarfile.TarFile, folder: str, manifest: Manifest, archive: Path, incoming: Path, advance: Advance
) -> None:
    """Unpack the files that the manifest names into `incoming`, in its order."""
    for entry in manifest.files:
        name, member = f"{folder}/{entry.file}", tar.next()
        if member is None:
            raise FeatureSetError(f"{archive} is truncated (it ends before {name}). Get it again.")
        if member.name != name:
            raise _rejected(archive, f"it has {printable(member.name)} where its manifest names {name}")
        if member.size != entry.bytes:
            problem = f"{name} has {member.size} bytes, its manifest says {entry.bytes}"
            raise FeatureSetError(f"{archive} is damaged ({problem}). Get it again.")
        tar.extract(member.replace(name=entry.file, deep=False), incoming, set_attrs=False, filter="data")
        atomic.sync_to_disk(incoming / entry.file)
        advance(entry.bytes)
    if (extra := tar.next()) is not None:
        raise _rejected(archive, f"it has {printable(extra.name)}, which its manifest does not name")


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise FeatureSetError(
            f"{name!r} is not a valid name for a feature set (1 to 80 letters, digits, _ and -, starting with a letter "
            "or digit). Import under another name with --as, or rename the folder before you export it."
        )
    return name


@contextlib.contextmanager
def _shared(features: FeatureSet, noise_scale: float | None, archive: Path, advance: Advance) -> Iterator[FeatureSet]:
    """Yield the set to pack: the given one, or a copy with noise, in a temporary folder beside the locked archive."""
    if noise_scale is None:
        yield features
        return
    if archive.is_file():
        problem = f"{archive} exists already, and two copies with noise let their owner average the noise away"
        raise PipelineError(f"{problem}. Give everyone that tar, or choose another path with -o.")
    folder = archive.with_name(f".{archive.name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
    folder.mkdir()
    try:
        yield FeatureSet(noise.write_copy(features, noise_scale, folder, advance))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(archive: Path) -> Iterator[None]:
    """Hold the lock of the archive's temporary file, which becomes the archive: no lock file is left."""
    if archive.exists() and not archive.is_file():
        kind = "a folder" if archive.is_dir() else "not a regular file"
        raise PipelineError(f"{archive} is {kind}. Give the path of a tar with -o.")
    if not archive.parent.is_dir():  # the lock would create it, whatever was mistyped
        raise PipelineError(f"{archive} cannot be written (the folder does not exist). Choose another path with -o.")
    _require_export(archive)
    with locks.opened(archive.with_name(f"{archive.name}.tmp")) as lock:
        if not lock.acquire():
            raise PipelineError(f"Another process is writing {archive}. Wait until it has ended, or stop it.")
        yield


def _require_export(archive: Path) -> None:
    """Raise PipelineError if there is a file that is neither empty nor a tar of a feature set."""
    if archive.exists() and archive.stat().st_size:
        try:
            manifest_of(archive)
        except FeatureSetError:
            problem = f"{archive} exists, but is not a tar of `pipeline features export`"
            raise PipelineError(f"{problem}. Remove it, or choose another path with -o.") from None


def _add(tar: tarfile.TarFile, name: str, file: Path, entry: FileEntry | None, advance: Advance) -> None:
    member = tarfile.TarInfo(name)  # with fixed times, owner and permissions, so that equal sets give equal bytes
    with bytes_of(file) as stream:
        member.size = os.fstat(stream.fileno()).st_size
        hashed = _Hashed(stream, file, advance)
        tar.addfile(member, hashed)  # type: ignore[arg-type]
    if entry and hashed.digest.hexdigest() != entry.sha256:
        problem = f"{file} is corrupt (SHA-256 differs from its manifest)"
        raise FeatureSetError(f"{problem}. Nothing was exported. `dvc pull` a good copy.")


class _Hashed:
    """A file that is hashed as it is read."""

    def __init__(self, stream: BinaryIO, file: Path, advance: Advance) -> None:
        self._stream, self._file, self._advance, self.digest = stream, file, advance, hashlib.sha256()

    def read(self, size: int) -> bytes:
        with reading(self._file):
            data = self._stream.read(size)
        self.digest.update(data)
        self._advance(len(data))
        return data


def _rejected(archive: Path, problem: str) -> FeatureSetError:
    advice = "It was not written by `pipeline features export`. Do not trust its source."
    return FeatureSetError(f"{archive} is rejected ({problem}). {advice}")


def _require_same(target: Path, manifest: Manifest) -> None:
    """Accept an intact set of the same fingerprint at `target`; reject anything else."""
    for error in verification.problems(target, full=False):
        if isinstance(error, SystemRefusal):
            raise error
        raise FeatureSetError(f"{target} exists and is not intact ({_problem(error)}). {_ELSEWHERE}")
    found, theirs = read_manifest(target).fingerprint, manifest.fingerprint
    if found != theirs:
        which = f"{found[:12]}, the archive's is {theirs[:12]}"
        raise FeatureSetError(f"{target} holds another feature set ({which}). {_ELSEWHERE}")


def _problem(error: PipelineError) -> str:
    """Return what is wrong, without a remedy that does not apply to an archive."""
    return error.problem if isinstance(error, InvalidFeatureSet) else str(error).removesuffix(".")
