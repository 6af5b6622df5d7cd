"""The prepared data set: the images and labels that both stages read, in one checked form.

A prepared data set is a folder:

    manifest.json   name, source, licence, class and domain names, image size; per split: rows, SHA-256 of content
    train.h5        images uint8 (N, H, W, 3), labels and domains int64 (N,), in the order of the samples' index
    test.h5         the same for the standard test split

Labels are positions in `class_names` and domains in `domain_names`, by construction; most data sets have one domain,
named as they are. The data set's hash covers pixels, labels, domains and both lists of names:
features extracted from one data set cannot be used with another by mistake.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from pipeline import provenance
from pipeline.errors import PipelineError

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Images:
    """Images of one split: images uint8 (N, H, W, 3) in 0..255; labels and domains int64 (N,), counted from 0."""

    images: np.ndarray
    labels: np.ndarray
    domains: np.ndarray

    @classmethod
    def of_one_domain(cls, images: np.ndarray, labels: np.ndarray) -> "Images":
        """Images that all come from domain 0."""
        return cls(images, labels, np.zeros(len(labels), np.int64))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def take(self, index: np.ndarray) -> "Images":
        """The images at these positions, in this order."""
        return Images(self.images[index], self.labels[index], self.domains[index])


@dataclass(frozen=True)
class Source:
    """A data set as its source gives it, before it is written."""

    class_names: list[str]
    splits: dict[str, Images]
    licence: str
    domain_names: list[str] | None = None  # None: one domain, named as the data set


class PreparedDataset:
    """A prepared data set on disk, opened by its manifest."""

    def __init__(self, path: Path) -> None:
        """Opens the data set in folder `path`.

        Raises:
            PipelineError: there is none, or its manifest cannot be read.
        """
        self.path = path
        manifest = path / "manifest.json"
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            self.class_names: list[str] = content["class_names"]
            self.domain_names: list[str] = content["domain_names"]
            self.image_size: int = content["image_size"]
            self.name: str = content["name"]
            self._splits: dict[str, dict] = content["splits"]
        except FileNotFoundError:
            raise PipelineError(f"{manifest} is missing: run `pipeline prepare-data`, or `dvc pull` it") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PipelineError(f"{manifest} cannot be read ({error!r}): run `pipeline prepare-data` again") from None

    @property
    def hash(self) -> str:
        """SHA-256 that stands for pixels, labels, domains and their names."""
        names = {"class_names": self.class_names, "domain_names": self.domain_names}
        return provenance.fingerprint({**names, "splits": self._splits})

    def rows(self, split: str) -> int:
        """Number of images in a split."""
        return self._splits[split]["rows"]

    def load(self, split: str) -> Images:
        """Reads a whole split into memory and checks it against the manifest.

        Raises:
            PipelineError: the file is missing, truncated, or does not hold what the manifest says.
        """
        file = self.path / f"{split}.h5"
        try:
            with h5py.File(file, "r") as h5:
                loaded = Images(h5["images"][()], h5["labels"][()], h5["domains"][()])
        except (OSError, KeyError) as error:
            raise PipelineError(f"{file} cannot be read ({error}): run `pipeline prepare-data` again") from None
        if _content_sha256(loaded) != self._splits[split]["sha256"]:
            raise PipelineError(
                f"{file} does not hold the {split} images of its manifest: run `pipeline prepare-data` again"
            )
        return loaded


def write(path: Path, name: str, source_name: str, source: Source) -> Path:
    """Writes a prepared data set; the manifest comes last, so a folder with a manifest is whole.

    Args:
        path: folder to write.
        name: the data set's name.
        source_name: where it came from.
        source: images, labels and class names; every split of the same image size.

    Returns:
        `path`.

    Raises:
        PipelineError: a split is empty, or a label is outside the class names or a domain outside the domain names.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").unlink(missing_ok=True)
    domain_names = source.domain_names or [name]
    splits = {}
    for split in SPLITS:
        content = source.splits[split]
        _check(content, split, source.class_names, domain_names)
        temporary = path / f"{split}.h5.tmp"
        with h5py.File(temporary, "w") as h5:
            h5.create_dataset("images", data=content.images)
            h5.create_dataset("labels", data=content.labels)
            h5.create_dataset("domains", data=content.domains)
        temporary.replace(path / f"{split}.h5")
        splits[split] = {"rows": len(content), "sha256": _content_sha256(content)}
    manifest = {
        "name": name,
        "source": source_name,
        "licence": source.licence,
        "class_names": source.class_names,
        "domain_names": domain_names,
        "image_size": int(source.splits["train"].images.shape[1]),
        "splits": splits,
    }
    provenance.write_json(path / "manifest.json", manifest)
    return path


def stratified_split(labels: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` samples with each class in proportion, and the rest.

    Classes get floor(count * share) samples; what is left over goes to the classes with the largest remainders
    (Hamilton's method), ties to the smaller label.

    Args:
        labels: int64 (N,).
        count: how many to draw, 0 <= count <= N.
        rng: decides which samples of a class are drawn.

    Returns:
        Two ascending int64 arrays of positions, (count,) and (N - count,).
    """
    classes, sizes = np.unique(labels, return_counts=True)
    quota = sizes * count / len(labels)
    take = np.floor(quota).astype(np.int64)
    for position in np.argsort(-(quota - take), kind="stable")[: count - take.sum()]:
        take[position] += 1
    drawn = [
        rng.permutation(np.flatnonzero(labels == label))[:number] for label, number in zip(classes, take, strict=True)
    ]
    chosen = np.sort(np.concatenate(drawn))
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


def _check(content: Images, split: str, class_names: list[str], domain_names: list[str]) -> None:
    if len(content) == 0:
        raise PipelineError(f"the {split} split has no images")
    if content.labels.min() < 0 or content.labels.max() >= len(class_names):
        raise PipelineError(f"the {split} split has a label outside the {len(class_names)} class names")
    if content.domains.min() < 0 or content.domains.max() >= len(domain_names):
        raise PipelineError(f"the {split} split has a domain outside the {len(domain_names)} domain names")


def _content_sha256(content: Images) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(content.images).data)
    digest.update(np.ascontiguousarray(content.labels, dtype="<i8").data)
    digest.update(np.ascontiguousarray(content.domains, dtype="<i8").data)
    return digest.hexdigest()
