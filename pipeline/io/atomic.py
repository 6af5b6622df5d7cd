"""Atomic writes: a file or folder is either complete or absent, even if the process is killed while writing.

Nothing is written in place: DVC links its cache into the project, so changing a file there would change the cache and
every other place that links to it.
"""

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.io import locks
from pipeline.io.system_errors import error_number, unwritten

KEPT = "completed work is kept; run the command again to resume"
"""What an interrupted command says if it can resume."""


@contextlib.contextmanager
def replace_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success and is removed on error.

    Args:
        path: The file to write; its folder must exist.
        sync: Wait until the content is on the disk, so that the file also survives a power cut.

    Raises:
        PipelineError: The file cannot be written. The previous file is kept.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        temporary.replace(path)
        if sync:
            sync_to_disk(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if _is_write_error(error):
            raise unwritten(path, error) from None
        raise


@contextlib.contextmanager
def replace_folder(path: Path, journal: str | None = None) -> Iterator[Path]:
    """Yield an empty staging folder that replaces `path` on success and is removed on error.

    The staging folder is `path` with ".tmp" added; what a killed process left in it is removed first. Sync the files
    that you put into it. `path` is absent for an instant, between two renames.

    Args:
        path: The folder.
        journal: Name of a folder in the staging folder that records finished work, and so must be keyed by everything
            that determines it. As soon as it exists, the staging folder is kept on error, which gets the note
            `KEPT`, and yielded as it is to the next process that names the same journal. `path` gets no journal.

    Raises:
        PipelineError: Another process is writing `path`, or a write failed. The previous folder is kept.
    """
    staging, old, lock = (path.with_name(f"{path.name}.{end}") for end in ("tmp", "old", "lock"))
    with locks.held(lock, str(path)):
        try:
            if not _has_journal(staging, journal):
                remove(staging)
                staging.mkdir()
            yield staging
            if journal is not None:
                remove(staging / journal)
            sync_to_disk(staging)
            remove(old)
            if os.path.lexists(path):
                path.replace(old)
            staging.replace(path)
            sync_to_disk(path.parent)
        except BaseException as error:
            if _has_journal(staging, journal):
                error.add_note(KEPT)
            else:
                shutil.rmtree(staging, ignore_errors=True)
            if _is_write_error(error):
                raise unwritten(path, error) from error
            raise
        finally:
            lock.unlink(missing_ok=True)  # while it is held: a process that opened it meanwhile is refused
        remove_replaced(path)


def _has_journal(staging: Path, journal: str | None) -> bool:
    return journal is not None and (staging / journal).is_dir()


def _is_write_error(error: BaseException) -> bool:
    """Return whether an error came from writing a file; h5py and safetensors have types of their own for it."""
    if isinstance(error, RuntimeError):
        return error_number(error) is not None
    return isinstance(error, OSError | SafetensorError)


def remove_replaced(path: Path) -> None:
    """Remove the folder that `path` replaced, in case a killed process did not."""
    with contextlib.suppress(OSError):
        remove(path.with_name(f"{path.name}.old"))


def write_bytes(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a file atomically; see `replace_file`."""
    with replace_file(path, sync) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, sync: bool = True) -> None:
    """Write a UTF-8 text file atomically; see `write_bytes`."""
    write_bytes(path, text.encode(), sync)


def write_json(path: Path, content: Any, sync: bool = True) -> None:
    """Write indented JSON atomically, keys in their given order; see `write_bytes`.

    The text is written part by part: as a whole, a partition of many clients and classes would take gigabytes.
    """
    with replace_file(path, sync) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(content))
        stream.write("\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], sync: bool = True) -> None:
    """Write a CSV file with a header atomically; every row has the keys of the first. See `write_bytes`."""
    write_text(path, _csv(rows, header=True), sync)


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a CSV file, or write it with a header if there is none; not synced.

    This is not atomic, but takes the same time however long the file has become: a process that is killed may leave a
    part of the last row, without its newline. Only append to a file that the same process created, because others may
    be linked to DVC's cache.

    Raises:
        PipelineError: The file cannot be written. It is as it was before.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8", newline="") as stream:
            stream.write(_csv(rows, header=not before))
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, before)
        raise unwritten(path, error) from None


def _csv(rows: Sequence[Mapping[str, Any]], header: bool) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
