"""Log remarks on a prepared data set: skipped images, small classes, odd class names, features of replaced images."""

import logging
from pathlib import Path

from pipeline.data import class_names, datasets
from pipeline.data.datasets import PreparedDataset
from pipeline.data.file_names import some
from pipeline.errors import PipelineError
from pipeline.feature_store import listing, read_manifest

log = logging.getLogger(__name__)

_CLASS_PROMPTS = "extract_features.class_prompts (a file: class name -> text)"


def log_outcome(dataset: PreparedDataset) -> None:
    """Log the size of the data set, and one line per kind of problem."""
    counts = ", ".join(f"{dataset.rows(split)} {split}" for split in datasets.SPLITS)
    domains = f", {len(dataset.domain_names)} domains" if len(dataset.domain_names) > 1 else ""
    names = dataset.class_names
    kinds = f"{len(names)} classes" if len(names) > 1 else "one class"
    log.info("%s: %s images of %s%s", dataset.path, counts, kinds, domains)
    _warn_about_one_class(names)
    _warn_about_skipped(dataset)
    _warn_about_small_classes(dataset)
    _warn_about_odd_names(names)


def hash_of(path: Path) -> str | None:
    """Return the hash of the data set in a folder, None if there is none that can be read."""
    try:
        return PreparedDataset(path).hash
    except PipelineError:
        return None


def log_sets_of_the_replaced(dataset_hash: str, sets: Path) -> None:
    """Warn of the feature sets in the folder `sets` that were extracted from the data set of that hash."""
    for path in listing.folders(sets):
        try:
            of_it = read_manifest(path).content.dataset_hash == dataset_hash
        except PipelineError:
            continue
        if of_it:
            log.warning(
                "%s was extracted from the images that these replace, and no longer fits the data set. Extract it "
                "again with --overwrite; to keep both, prepare these under another prepare_data.name", path,
            )  # fmt: skip


def _warn_about_one_class(names: list[str]) -> None:
    if len(names) == 1:
        log.warning(
            "all images are of one class, %s: every accuracy will be 100 %%, and TDCL has nothing to contrast. The "
            "folders in prepare_data.path must be the classes", some(names),
        )  # fmt: skip


def _warn_about_skipped(dataset: PreparedDataset) -> None:
    skipped = [image for images in dataset.manifest.skipped.values() for image in images]
    if skipped:
        log.warning(
            "broken images left out: %d, the first is %s (%s). %s lists them all",
            len(skipped), skipped[0].path, skipped[0].reason, dataset.path / "manifest.json",
        )  # fmt: skip


def _warn_about_small_classes(dataset: PreparedDataset) -> None:
    names = dataset.class_names
    train, test = (datasets.label_counts(dataset.path, split, len(names)) for split in datasets.SPLITS)
    stay = (
        ". They stay classes, each with a prompt and an output of the network. Delete their folders to leave them out"
    )
    for text, chosen, rest in (
        ("without images", train + test == 0, stay),
        ("with one image", train + test == 1, ""),
        ("without test images", (train > 1) & (test == 0), ""),
        ("without training images", (train == 0) & (test > 1), ""),
    ):
        if chosen.any():
            found = [name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen]
            log.warning("classes %s: %s (%d of %d)%s", text, some(found), len(found), len(names), rest)


def _warn_about_odd_names(names: list[str]) -> None:
    if found := class_names.without_words(names):
        log.warning(
            "class names that are numbers or ids, which mean nothing in a prompt: %s (%d of %d). Rename the classes, "
            "or set %s", some(found), len(found), len(names), _CLASS_PROMPTS,
        )  # fmt: skip
    if found := class_names.differing_in_case(names):
        log.warning(
            "class names that differ only in upper and lower case are separate classes, but many text encoders read "
            "them as one: %s. Merge the folders, or set %s", some(found), _CLASS_PROMPTS,
        )  # fmt: skip
