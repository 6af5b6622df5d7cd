"""The prepared data set: images and labels in one checked form, which both stages read.

A prepared data set is a folder:

    manifest.json   name, source, licence, class and domain names, image size; rows and hash per split; broken images;
                    of a source in large files, the names of these, and its address on the hub
    train.h5        images uint8 (N, H, W, 3), labels and domains int64 (N,), in the order of the image index; and, of
                    images from files, `files` uint64 (N,), the hashes of these (see `image_hashes`)
    test.h5         the same for the standard test split

Labels are positions in `class_names` and domains in `domain_names`; most data sets have one domain, named like the data
set. The data set's hash covers pixels, labels, domains and both lists of names, so that features extracted from one
data set cannot be used with another by mistake.

Images may exceed memory. They are written block by block, contiguous and uncompressed, and read through a memory map,
which processes share. The folder is written atomically, and equal inputs give equal bytes. A process that was killed
leaves its unfinished work in <name>.tmp, and the next one continues it (see `split_file`).
"""

import hashlib
import logging
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline import provenance
from pipeline.data.images import Images, Origin, Skipped, Source, Split, stratified_split
from pipeline.errors import DataError
from pipeline.io import atomic
from pipeline.io.atomic import replace_folder
from pipeline.io.hdf5 import check_not_written, open_to_read, plain_dataset
from pipeline.io.system_errors import in_words, reading
from pipeline.settings.params import PrepareData
from pipeline.text import printable

if TYPE_CHECKING:
    from pipeline.io.resumable import ResumableStore

log = logging.getLogger(__name__)

__all__ = ["Images", "Manifest", "PreparedDataset", "Source", "stratified_split", "write"]

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "test")
_PREPARE_AGAIN = "Run `pipeline prepare-data` again, or get a good copy with `dvc pull`."


class BrokenImages(DataError):
    """Images of a source cannot be read, and skipping them was not allowed."""

    def __init__(self, images: list[Skipped]) -> None:
        """Store the images, in the order of splits and images."""
        super().__init__(f"{len(images)} images cannot be read")
        self.images = images


class SplitEntry(BaseModel):
    """A split in the manifest: its number of images, and the SHA-256 of images, labels and domains."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rows: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """The data set's manifest.json; `skipped` lists the broken images that are in no split."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    source: str
    licence: str
    class_names: list[str] = Field(min_length=1)
    domain_names: list[str] = Field(min_length=1)
    image_size: int = Field(ge=1)
    splits: dict[SplitName, SplitEntry] = Field(min_length=2)
    skipped: dict[SplitName, list[Skipped]]
    origin: Origin | None = None

    @property
    def hash(self) -> str:
        """SHA-256 over the hashes of the splits, which cover pixels, labels and domains, and the names."""
        splits = {split: self.splits[split].model_dump() for split in SPLITS}
        names = {"class_names": self.class_names, "domain_names": self.domain_names}
        return provenance.fingerprint({**names, "splits": splits})


class PreparedDataset:
    """A prepared data set on disk, opened by its manifest."""

    def __init__(self, path: str | Path) -> None:
        """Open the data set in folder `path` (`~` is the home folder); raise DataError if it cannot be read."""
        self.path = path = Path(path).expanduser()
        self.manifest = _read_manifest(path / "manifest.json")
        self.name = self.manifest.name
        self.class_names = self.manifest.class_names
        self.domain_names = self.manifest.domain_names
        self.image_size = self.manifest.image_size
        self.hash = self.manifest.hash

    def rows(self, split: SplitName) -> int:
        """Number of images in a split."""
        return self.manifest.splits[split].rows

    def warn_if_unlike(self, params: PrepareData) -> None:
        """Log a warning if another number or size of images was prepared than the settings ask for."""
        skipped = len(self.manifest.skipped.get("train", []))
        found, wanted = [], []
        if params.train_subset not in (None, self.rows("train") + skipped):
            found.append(f"{self.rows('train')} training images")
            wanted.append(f"train_subset = {params.train_subset}")
        if params.image_size not in (None, self.image_size):
            found.append(f"images of {self.image_size} px")
            wanted.append(f"image_size = {params.image_size}")
        if found:
            log.warning(
                "%s has %s, but prepare_data has %s. Run `pipeline prepare-data` to use these settings",
                self.path, " and ".join(found), " and ".join(wanted),
            )  # fmt: skip

    def load(self, split: SplitName) -> Images:
        """Open a split as a read-only memory map and check all of it against the manifest.

        The check reads the file once, in bounded memory. Labels and domains are arrays in memory.

        Raises:
            DataError: The file is missing, truncated, or differs from the manifest.
            SystemRefusal: The operating system did not let it be read.
        """
        file = self.path / f"{split}.h5"
        try:
            with open_to_read(file) as h5:
                for name in ("images", "labels", "domains"):
                    plain_dataset(h5, name, file)
                stored = h5["images"]
                on_disk = Images(stored, h5["labels"][()], h5["domains"][()])
                matches = self._matches_manifest(split, on_disk)
                mapped = np.memmap(file, stored.dtype, "r", stored.id.get_offset(), stored.shape)
        except FileNotFoundError:
            raise DataError(f"{file} is missing. {_PREPARE_AGAIN}") from None
        except (OSError, KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            check_not_written(file)
            raise DataError(f"{file} is truncated or corrupt ({in_words(error)}). {_PREPARE_AGAIN}") from None
        if not matches:
            check_not_written(file)
            raise DataError(f"{file} does not hold the {split} images of its manifest. {_PREPARE_AGAIN}")
        return replace(on_disk, images=mapped)

    def file_hashes(self, split: SplitName) -> np.ndarray | None:
        """Return the hashes of the images' files, uint64 (N,); None if they have none, or an older version prepared it.

        The split's own hash does not cover them, because the features do not depend on them. Raise DataError if they
        are not one number per image, or the file is damaged.
        """
        file = self.path / f"{split}.h5"
        try:
            with open_to_read(file) as h5:
                if "files" not in h5:
                    return None
                plain_dataset(h5, "files", file)
                hashes = h5["files"][()]
        except (OSError, KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            check_not_written(file)
            raise DataError(f"{file} is truncated or corrupt ({in_words(error)}). {_PREPARE_AGAIN}") from None
        if hashes.dtype != np.uint64 or hashes.shape != (self.rows(split),):
            raise DataError(f"{file} does not hold one file hash per image. {_PREPARE_AGAIN}")
        return hashes

    def _matches_manifest(self, split: SplitName, content: Images) -> bool:
        entry, size = self.manifest.splits[split], self.image_size
        expected = {"images": (entry.rows, size, size, 3), "labels": (entry.rows,), "domains": (entry.rows,)}
        found = {name: values.shape for name, values in vars(content).items()}
        return found == expected and _sha256(content) == entry.sha256


def write(path: Path, name: str, source_name: str, source: Source, skip_broken: bool = True) -> Path:
    """Write a prepared data set atomically, replacing the previous one at `path`.

    Args:
        path: The data set's folder.
        name: The data set's name.
        source_name: The source's name, for the manifest.
        source: Images, labels and class names; both splits have the same image size.
        skip_broken: Leave out images that cannot be read, and list them in the manifest.

    Returns:
        `path`.

    Raises:
        BrokenImages: Images cannot be read and `skip_broken` is False; holds all of them.
        DataError: A split is empty, a label or domain has no name, two classes or domains share one, image sizes
            differ, another process writes the same data set, or the disk is full; the previous data set is kept.
    """
    domain_names = source.domain_names or [name]
    check_names(source.class_names, "class")
    check_names(domain_names, "domain")
    if source.splits["train"].image_size != source.splits["test"].image_size:
        raise DataError(f"The splits of {name} have images of different sizes. Resize them to one size.")
    for split in SPLITS:
        _check_positions(source.splits[split], split, len(source.class_names), len(domain_names))
    from pipeline.data.split_file import journal_name  # imports torch, which readers of a data set do without
    from pipeline.io.resumable import ResumableStore

    unfinished = journal_name(source.splits)
    with replace_folder(path, unfinished) as folder:
        _check_space(folder, source)
        journal = ResumableStore(folder / unfinished) if unfinished else None
        entries, skipped = _write_splits(folder, source, skip_broken, journal)
        size = source.splits["train"].image_size
        about = {"name": name, "source": source_name, "licence": source.licence, "image_size": size}
        names = {"class_names": source.class_names, "domain_names": domain_names}
        manifest = Manifest.model_validate(
            about | names | {"splits": entries, "skipped": skipped, "origin": source.origin}
        )
        absent = set() if source.origin else {"origin"}
        atomic.write_json(folder / "manifest.json", manifest.model_dump(mode="json", exclude=absent))
    return path


def _read_manifest(file: Path) -> Manifest:
    try:
        with reading(file):
            return Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{file} is missing. Run `pipeline prepare-data`, or `dvc pull`.") from None
    except ValidationError as error:
        detail = error.errors()[0]
        problem = printable(": ".join(filter(None, [".".join(map(str, detail["loc"])), detail["msg"]])))
        raise DataError(f"{file} is not the manifest of a data set ({problem}). {_PREPARE_AGAIN}") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}). {_PREPARE_AGAIN}") from None


def label_counts(path: Path, split: SplitName, num_classes: int) -> np.ndarray:
    """Count the images per class of a split that was just written, int64 (num_classes,), without checking it."""
    with open_to_read(path / f"{split}.h5") as h5:
        return np.bincount(h5["labels"][()], minlength=num_classes)


def _write_splits(
    folder: Path, source: Source, skip_broken: bool, journal: "ResumableStore | None"
) -> tuple[dict[SplitName, SplitEntry], dict[SplitName, list[Skipped]]]:
    """Write both splits before raising an error about broken images, so that one run names them all."""
    entries, skipped = {}, {}
    for split in SPLITS:
        entry, skipped[split] = _write_split(folder / f"{split}.h5", source.splits[split], journal)
        if entry is not None:
            entries[split] = entry
    if any(skipped.values()) and not skip_broken:
        raise BrokenImages([image for split in SPLITS for image in skipped[split]])
    for split in SPLITS:
        if split not in entries:
            first = skipped[split][0]
            problem = f"The {split} split has no readable image; the first is {first.path} ({first.reason})"
            raise DataError(f"{problem}. Repair its images.")
    return entries, skipped


def _write_split(
    file: Path, content: Split, journal: "ResumableStore | None"
) -> tuple[SplitEntry | None, list[Skipped]]:
    """Write a split block by block, without the skipped images; None if no image is left."""
    from pipeline.data.split_file import SplitFile

    out = SplitFile(file, content, journal)
    out.write_images()
    rows = out.rows
    if len(rows) == 0:
        return None, out.skipped
    labels, domains = (values[rows].astype("<i8", copy=False) for values in (content.labels, content.domains))
    out.finish(labels, domains)
    return SplitEntry(rows=len(rows), sha256=_finish(out.digest, labels, domains)), out.skipped


def check_names(names: list[str], kind: str) -> None:
    """Raise DataError if two classes or domains, which `kind` says, have one name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        detail = f'{twice[0]!r}; "_" reads as a space'
        raise DataError(f"Two {kind} folders or labels have the same name ({detail}). Merge or rename one.")


def _check_positions(content: Split, split: SplitName, num_classes: int, num_domains: int) -> None:
    if len(content) == 0:
        raise DataError(f"The {split} split has no images. Add some.")
    if content.labels.min() < 0 or content.labels.max() >= num_classes:
        raise DataError(f"The {split} split has a label beyond the {num_classes} classes. Correct the labels.")
    if content.domains.min() < 0 or content.domains.max() >= num_domains:
        raise DataError(f"The {split} split has a domain beyond the {num_domains} domains. Correct the domains.")


def _check_space(folder: Path, source: Source) -> None:
    needed = sum(len(content) * 3 * content.image_size**2 for content in source.splits.values())
    there = sum(file.stat().st_blocks * 512 for file in folder.glob("*.h5"))  # of an interrupted process
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise DataError(
            f"The data set needs {(needed - there) / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB free. "
            "Make room, or lower prepare_data.image_size or train_subset."
        )


def _sha256(content: Images) -> str:
    """Return the SHA-256 over images, labels and domains, in this order, reading one block at a time."""
    digest = hashlib.sha256()
    for block in content.blocks():
        digest.update(np.ascontiguousarray(block.images).data)
    return _finish(digest, content.labels, content.domains)


def _finish(digest: "hashlib._Hash", labels: np.ndarray, domains: np.ndarray) -> str:
    for values in (labels, domains):
        digest.update(np.ascontiguousarray(values, dtype="<i8").data)
    return digest.hexdigest()
