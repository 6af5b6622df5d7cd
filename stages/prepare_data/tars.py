"""Tars in the layout of the webdataset library: files that follow each other and share a key are one sample.

A member's name up to the first dot of its last part is the key, and the rest its field: n01/0001.jpg, n01/0001.cls.
The field of the image is its format (jpg, png, webp, ...). The label is the number or the name in `cls`; or else
"label" in `json`; or else the class name in `txt`. Class names come from classnames.txt beside the tars or their
folders (one per line, as CLIP_benchmark's data sets have it), or else from `txt`, if it is the same for all images of
a class.

Headers are read once, to list the samples: 40 bytes per image stay in memory. Images are read in order by offset.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import tarfile
from array import array
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.data.decode import ENDINGS
from pipeline.data.file_names import canonical
from pipeline.data.images import Source
from pipeline.errors import DataError
from pipeline.io import system_errors
from pipeline.io.compression import LENGTH, compression_of
from pipeline.settings.params import PrepareData
from pipeline.text import first_few, printable
from stages.prepare_data import shard_files, shards
from stages.prepare_data.labels import Labels, read_names
from stages.prepare_data.shards import EncodedImages, Listing, Shards

log = logging.getLogger(__name__)

_META = re.compile(r"__[^/]*__($|/)")  # members about the tar itself
_BLOCK = 512
_MOST_TEXT = 2**20  # bytes of a label or description
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_GET_AGAIN = "Get the complete file"

Place = tuple[int, int, int]
"""Offset of a member's header, offset of its content, and its size, bytes."""


def webdataset(root: Path, params: PrepareData) -> Source:
    """Read a folder or a pattern of tars; see the module's description, and `shard_files` for the splits.

    Raises:
        DataError: There are no tars, one is damaged, truncated or has no images, or a sample has no label or several
            images.
    """
    folder, names = shard_files.find(root, (".tar",))
    found = Shards(str(root), folder, shard_files.by_split(str(root), names, one_set=False))
    folders = [folder, folder.parent, *(folder / name for name in sorted({os.path.dirname(name) for name in names}))]
    return shards.read(found, lambda split, files: _list(found, files, params), read_names(folders), params.seed)


class TarImages(EncodedImages):
    """The images of some tars; the arrays have a row per image."""

    def __init__(self, root: Path, files: Sequence[str], image_size: int, tars: array, places: array) -> None:
        """`tars` are the numbers of the images' files, int32 (N,), and `places` int64 (N * 3)."""
        super().__init__(root, files, image_size)
        self._tars = np.frombuffer(tars, np.int32)
        self._places = np.frombuffer(places, np.int64).reshape(-1, 3)

    def items(self, positions: np.ndarray) -> Generator[bytes]:
        """Yield the bytes of the image files."""
        numbers = self._tars[positions]
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        for start, end in itertools.pairwise([*starts, len(positions)]):  # none if there are no positions
            file = self.root / self.files[numbers[start]]
            with system_errors.reading(file), file.open("rb", buffering=0) as stream:
                for _, offset, size in self._places[positions[start:end]].tolist():
                    content = os.pread(stream.fileno(), size, offset)
                    if len(content) < size:
                        raise DataError(f"{file} is shorter than when its images were listed. {_GET_AGAIN}.")
                    yield content

    def identity(self) -> str:
        """Add a hash of the images' places, which the choice of a column changes, to the files."""
        digest = hashlib.sha256(self._tars.data)
        digest.update(self._places.data)
        return f"{super().identity()}\n{digest.hexdigest()}"

    def name(self, position: int) -> str:
        """Return the tar's name and the member's."""
        file = self.files[self._tars[position]]
        with (self.root / file).open("rb") as stream:
            stream.seek(int(self._places[position, 0]))
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                member = tar.next()
        return printable(f"{canonical(file)}/{member.name if member else '?'}")


class _Sample:
    """The members of one sample, by field."""

    def __init__(self, tar: Path, key: str) -> None:
        self.tar, self.key = tar, key
        self.fields: dict[str, Place] = {}

    def image(self, column: str | None) -> Place | None:
        """Return where the image is; None if the sample has none."""
        names = [column] if column else [name for name in self.fields if f".{name}" in ENDINGS]
        if len(names) > 1:
            raise self.error(f"has several images ({first_few(names)})", "Set prepare_data.image_column to one of them")
        return self.fields.get(names[0].lower()) if names else None

    def label(self, stream: IO[bytes], column: str | None) -> int | str | None:
        """Return the sample's label; None if it has none."""
        if column is None and "cls" in self.fields:
            text = self._text(stream, "cls").strip()
            return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else text or None
        if "json" in self.fields:
            return self._of_json(stream, column or "label")
        return (self._text(stream, "txt").strip() or None) if column is None and "txt" in self.fields else None

    def text(self, stream: IO[bytes]) -> str | None:
        """Return the text of `txt`, if the label has a field of its own."""
        return self._text(stream, "txt").strip() if {"txt", "cls"} <= self.fields.keys() else None

    def error(self, problem: str, advice: str) -> DataError:
        """Return the error to raise about this sample."""
        return DataError(f"{printable(f'{self.tar}: the sample {self.key} {problem}')}. {advice}.")

    def _of_json(self, stream: IO[bytes], column: str) -> int | str | None:
        try:
            content = json.loads(self._text(stream, "json"))
        except (ValueError, RecursionError) as error:
            raise self.error(f"has a .json that cannot be read ({error})", _GET_AGAIN) from None
        label = content.get(column) if isinstance(content, dict) else None
        if label is None or (isinstance(label, int | str) and not isinstance(label, bool)):
            return label
        kind = type(label).__name__
        raise self.error(
            f"has a {kind} as {column} in its .json", "Set prepare_data.label_column to a number or a name"
        )

    def _text(self, stream: IO[bytes], field: str) -> str:
        _, offset, size = self.fields[field]
        if size > _MOST_TEXT:
            raise self.error(f"has a .{field} of {size:,} bytes", "Only labels and short descriptions are read")
        try:
            return os.pread(stream.fileno(), size, offset).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"has a .{field} that is not UTF-8", "Write it as UTF-8") from None


def _list(found: Shards, files: Sequence[str], params: PrepareData) -> Listing:
    """List the samples of some tars."""
    tars, places = array("i"), array("q")
    labels = Labels(found.title)
    texts: dict[int, str | None] = {}  # None: several texts, so captions
    without_image = 0
    for number, name in shards.tracked(files):
        file, before = found.root / name, len(labels)
        fields: set[str] = set()
        with system_errors.reading(file), file.open("rb") as stream:
            for sample in _samples(file, stream):
                image = sample.image(params.image_column)
                if image is None:
                    fields |= sample.fields.keys()
                    without_image += 1
                    continue
                tars.append(number)
                places.extend(image)
                label = sample.label(stream, params.label_column)
                labels.add(label, f"{name}/{sample.key}")
                if isinstance(label, int) and (text := sample.text(stream)) is not None:
                    texts[label] = text if texts.setdefault(label, text) == text else None
        if len(labels) == before:
            there = f"only {first_few([f'.{field}' for field in sorted(fields)])}" if fields else "no files"
            advice = (
                "Set prepare_data.image_column to the ending of the images" if fields else "Remove it, or get it again"
            )
            raise DataError(f"{printable(f'{file} has no images, {there}')}. {advice}.")
    if without_image:
        log.warning("%s: samples without an image were skipped: %d", found.title, without_image)
    named = {label: text for label, text in texts.items() if text}
    return Listing(TarImages(found.root, files, params.image_size, tars, places), labels, named)


def _samples(file: Path, stream: IO[bytes]) -> Iterator[_Sample]:
    """Yield the samples of a tar in order."""
    sample: _Sample | None = None
    for member in _members(file, stream):
        folder, _, base = member.name.rpartition("/")
        key, _, field = base.partition(".")
        field = field.lower()
        if not key or not field or _META.match(member.name) or not _is_plain(member):
            continue
        key = f"{folder}/{key}" if folder else key
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(file, key)
        if field in sample.fields:
            raise sample.error(f"has two files .{field}", "Give every sample a key of its own")
        sample.fields[field] = member.offset, member.offset_data, member.size
    if sample is not None:
        yield sample


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Return whether the tar has as many bytes of the member as its size says."""
    return member.type in _REGULAR and not member.issparse()


def _members(file: Path, stream: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, which must be complete: its end has a mark."""
    size = os.fstat(stream.fileno()).st_size
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # they would grow with the tar
                if _is_plain(member) and member.offset_data + member.size > size:
                    raise DataError(f"{file} is truncated in {printable(member.name)}. {_GET_AGAIN}.")
                yield member
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if kind := compression_of(os.pread(stream.fileno(), LENGTH, 0)):
            raise DataError(f"{file} is compressed ({kind}). Decompress it.") from None
        problem = "is empty" if size == 0 else f"is not a tar, or is damaged ({printable(str(error))})"
        raise DataError(f"{file} {problem}. {_GET_AGAIN}.") from None
    if os.pread(stream.fileno(), _BLOCK, end) != bytes(_BLOCK):
        raise DataError(f"{file} is truncated or damaged at byte {end:,}. {_GET_AGAIN}.")
