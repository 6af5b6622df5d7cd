"""Write the HDF5 file of a split so that an interrupted process continues where it was.

Pixels are most of the bytes and of the work. They go to a fixed place in the file, past HDF5's own head, so a kill
cannot damage what was written before. A journal (a `ResumableStore` beside the file) says every half minute, and on
Ctrl+C or SIGTERM, how far the pixels are on the disk: the rows that they come from, the broken images, and the SHA-256
of all pixels up to there. The next process compares this hash with the file, and reads the images that follow. Labels
are added when all pixels are written. Equal images give equal bytes, interrupted or not.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch

from pipeline import provenance
from pipeline.data import decode
from pipeline.data.images import BLOCK_BYTES, Block, Skipped, Split
from pipeline.io.atomic import sync_to_disk
from pipeline.io.resumable import ResumableStore
from pipeline.sigterm import Terminated

log = logging.getLogger(__name__)

SECONDS_BETWEEN_SAVES = 30.0
_JOURNAL = "unfinished"
_VERSION = 1


def journal_name(splits: Mapping[str, Split]) -> str | None:
    """Return the name of the journal's folder; None to keep no journal.

    It changes if an image, its place, or a decoder does: another decoder may read an image that is recorded as broken.
    """
    images = {name: split.identity() for name, split in splits.items()}
    if None in images.values():
        return None
    sizes = {name: [len(split), split.image_size] for name, split in splits.items()}
    key = provenance.fingerprint({"version": _VERSION, "decoders": decode.VERSIONS, "images": images, "sizes": sizes})
    return f"{_JOURNAL}-{key[:16]}"


class _Point(NamedTuple):
    """How far a file is: the lengths of its lists, the row that comes next, and the hash of all pixels."""

    rows: int
    files: int
    skipped: int
    next: int
    sha256: str


class SplitFile:
    """The file of one split; `rows`, `files` and `skipped` are of the images that were read so far."""

    def __init__(self, file: Path, content: Split, journal: ResumableStore | None) -> None:
        """Start the file, or continue what the journal has of it."""
        self.file, self._content, self._journal = file, content, journal
        self.digest = hashlib.sha256()
        self.skipped: list[Skipped] = []
        self._rows: list[np.ndarray] = [np.empty(0, np.int64)]
        self._files: list[np.ndarray] = []
        self._written = 0
        self._saves = [self._point(0)]  # a point per unit of the journal, after the start
        self._offset = _put_head(file, len(content), content.image_size)
        self._pixels = os.open(file, os.O_RDWR)
        self._done = self._resume() if journal else self._saves[0]

    def write_images(self) -> None:
        """Read all images that are missing, and write them; an interrupt saves what is there."""
        try:
            saved = time.monotonic()
            for block in self._content.blocks(self._done.next):
                self._append(block)
                if self._journal and time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                    self._save()
                    saved = time.monotonic()
            if len(self._saves) > 1:  # a split that took long is not read again while the other one is
                self._save()
        except (KeyboardInterrupt, Terminated):
            if self._journal and self._done != self._saves[-1]:
                self._save()
            raise
        finally:
            os.close(self._pixels)

    @property
    def rows(self) -> np.ndarray:
        """The rows of the split that are in the file, int64 (n,)."""
        return np.concatenate(self._rows)

    def finish(self, labels: np.ndarray, domains: np.ndarray) -> None:
        """Add labels and domains, int64 (n,), and the hashes of the images' files, and wait until all is on disk."""
        if len(labels) < len(self._content):
            _put_head(self.file, len(labels), self._content.image_size)  # some images were broken
        with h5py.File(self.file, "a") as h5:
            h5.create_dataset("labels", data=labels)
            h5.create_dataset("domains", data=domains)
            if self._files:
                h5.create_dataset("files", data=np.concatenate(self._files).astype("<u8", copy=False))
        sync_to_disk(self.file)

    def _append(self, block: Block) -> None:
        pixels = np.ascontiguousarray(block.images).reshape(-1)
        self._write(pixels.data)
        self.digest.update(pixels.data)
        self._add(block.rows, block.files, block.skipped)
        # In one step, for an interrupt may come between any two.
        self._done = self._point(self._done.next + len(block.rows) + len(block.skipped))

    def _point(self, following: int) -> _Point:
        counts = len(self._rows), len(self._files), len(self.skipped)
        return _Point(*counts, following, self.digest.hexdigest())

    def _add(self, rows: np.ndarray, files: np.ndarray | None, skipped: list[Skipped]) -> None:
        self._rows.append(rows)
        if files is not None:
            self._files.append(files)
        self.skipped += skipped
        self._written += len(rows)

    def _write(self, content: memoryview) -> None:
        place = self._offset + self._written * self._image_bytes
        while content:
            count = os.pwrite(self._pixels, content, place)
            place, content = place + count, content[count:]

    @property
    def _image_bytes(self) -> int:
        return 3 * self._content.image_size**2

    def _save(self) -> None:
        """Record what was written since the last save."""
        assert self._journal is not None
        os.fsync(self._pixels)
        start, end = self._saves[-1], self._done
        rows = np.concatenate([np.empty(0, np.int64), *self._rows[start.rows : end.rows]])
        tensors = {"rows": torch.from_numpy(rows)}
        if end.files:
            hashes = np.concatenate([np.empty(0, np.uint64), *self._files[start.files : end.files]])
            tensors["files"] = torch.from_numpy(hashes.view(np.int64))
        skipped = [vars(image) for image in self.skipped[start.skipped : end.skipped]]
        meta = {"next": end.next, "skipped": skipped, "sha256": end.sha256}
        self._journal.save(self._unit, tensors, meta)
        self._saves.append(end)

    def _resume(self) -> _Point:
        """Take over what the journal records and the file holds, and return how far that is."""
        assert self._journal is not None
        while (unit := self._journal.load(self._unit)) is not None:
            tensors, meta = unit
            digest = self.digest.copy()
            for pixels in self._stored(len(tensors["rows"])):
                digest.update(pixels)
            if digest.hexdigest() != meta["sha256"]:
                log.warning("%s differs from its journal. Its last images are read again", self.file)
                self._journal.discard(name for name in self._journal.names() if name >= self._unit)
                break
            files = tensors["files"].numpy().view(np.uint64) if "files" in tensors else None
            self._add(tensors["rows"].numpy(), files, [Skipped(**image) for image in meta["skipped"]])
            self.digest = digest
            self._saves.append(self._point(meta["next"]))
        if following := self._saves[-1].next:
            log.info("%s: continuing after %d of %d images", self.file.stem, following, len(self._content))
        return self._saves[-1]

    def _stored(self, count: int) -> Iterator[bytes]:
        """Yield the pixels of the next images in the file."""
        place = self._offset + self._written * self._image_bytes
        end = place + count * self._image_bytes
        while place < end and (pixels := os.pread(self._pixels, min(BLOCK_BYTES, end - place), place)):
            yield pixels
            place += len(pixels)

    @property
    def _unit(self) -> str:
        return f"{self.file.stem}-{len(self._saves) - 1:06d}"


def _put_head(file: Path, count: int, size: int) -> int:
    """Make a file of `count` images, or give an existing one this many, and return where the pixels start.

    HDF5's head is made in another file, with a hole for the pixels, and copied, so that pixels stay as they are.
    """
    draft = file.with_name(f"{file.name}.head")
    with h5py.File(draft, "w") as h5:
        images = h5.create_dataset("images", (count, size, size, 3), np.uint8)
        images[0] = 0  # HDF5 reserves the place of all images when the first one is written
        offset = int(images.id.get_offset())
    length = draft.stat().st_size
    with draft.open("rb") as stream:
        head = stream.read(offset)
    draft.unlink()
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.pwrite(handle, head, 0)
        os.ftruncate(handle, length)
    finally:
        os.close(handle)
    return offset
