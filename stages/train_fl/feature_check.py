"""Check that a feature set fits the data set, the settings, the frozen model and the method before training.

Feature sets are often received rather than extracted locally (`dvc pull`, another repository, a manual copy). Their
manifest states data, settings and model, which are compared with the project. Every mismatch is one line that names
both sides and how to accept the set. Files that training does not need are compared only if they are present: the
frozen model's manifest, and the files that settings name (`class_prompts`, `negative_words`, `basis`,
`image_conditioning`).
"""

import logging
from itertools import zip_longest
from typing import Any

import numpy as np

from pipeline import provenance
from pipeline.data.datasets import PreparedDataset
from pipeline.diffusion import frozen_model, prompts
from pipeline.errors import FeatureSetError
from pipeline.feature_store import FeatureSet
from pipeline.settings.config import Config
from pipeline.settings.params import Guidance

log = logging.getLogger(__name__)

_IMAGES_CHECKED = 16
_OR_EXTRACT = "or run `pipeline extract-features --overwrite`."
_COMPARED = ("timestep", "image_size", "denoise_prompt", "negatives", "noise_seed", "dtype", "storage")
_FILES = {"class": "class_prompts", "self-supervised": "negative_words"}  # the setting that names a file of texts


def open_checked(config: Config, dataset: PreparedDataset) -> FeatureSet:
    """Open the feature set that params.yaml names; shards may be missing. A set with noise fits as its source does.

    Raises:
        FeatureSetError: There is none; it was made from another data set or model, or with other settings; or by a
            backbone that was trained on images of the data set, and the settings do not allow it.
    """
    features = FeatureSet(config.features_dir, partial=True)
    check_unseen(features, config.params.train_fl.allow_seen_images)
    _check_data(features, dataset)
    different = _different_settings(features, config)
    if "prompts" not in different:
        different |= _different_prompts(features, config)
    if different:
        theirs, ours = (
            ", ".join(f"{key} {'null' if pair[side] is None else repr(pair[side])}" for key, pair in different.items())
            for side in (0, 1)
        )
        raise FeatureSetError(
            f"{features.path} was extracted with {theirs}, but extract_features here has {ours}. Give params.yaml "
            f"the set's values to train from it, {_OR_EXTRACT}"
        )
    _check_files(features, config)
    if added := features.manifest.content.added_noise:
        log.info("%s has %s", features.path, added)
    return features


def check_method(features: FeatureSet, index: np.ndarray, guidance: Guidance, needs_labels: bool, method: str) -> None:
    """Check that a set can guide a method, whose name is `method`, on the images `index`, int64 (n,).

    Raises:
        FeatureSetError: The prompts name classes and training uses no labels, or the reverse; or TDCL has nothing to
            contrast.
    """
    check_prompts(features.manifest.content.positive, needs_labels, method, f"{features.path} was extracted with")
    if guidance.tdcl_weight:
        _check_prompts_differ(features, index)


def check_prompts(positive: str, needs_labels: bool, method: str, has: str) -> None:
    """Check that prompts suit a method: what is guided by the class's prompt sees the labels.

    Args:
        positive: Which prompt matches an image: `feature_store.Content.positive`.
        needs_labels: Whether the method trains with labels.
        method: Its name.
        has: Start of the message, before "prompts that ...".

    Raises:
        FeatureSetError: The prompts name classes and training uses no labels, or the reverse.
    """
    names_classes = positive == "label"
    if names_classes and not needs_labels:
        raise FeatureSetError(
            f"{has} prompts that name each image's class, which training without labels ({method}) must not see. Set "
            "extract_features.prompts to self-supervised and extract."
        )
    if needs_labels and not names_classes:
        raise FeatureSetError(
            f"{has} self-supervised prompts, which name no class, but {method} trains with labels and is guided by the "
            "class's prompt. Set extract_features.prompts to class and extract."
        )


def _check_prompts_differ(features: FeatureSet, index: np.ndarray) -> None:
    """Check that features differ between prompts, on a few of the images `index`, int64 (n,), that the run needs.

    Extraction rejects prompts that the model cannot distinguish; sets of older versions may contain them, and then
    every image has equal features under them, which TDCL cannot contrast. FeatureSetError names two such prompts.
    """
    rows = features.read(np.sort(index)[:_IMAGES_CHECKED])
    equal: set[tuple[int, int]] | None = None
    for numbers, values in zip(rows.prompt_class.tolist(), rows.prompted, strict=True):
        first: dict[bytes, int] = {}
        pairs = [(first.setdefault(row.tobytes(), number), number) for number, row in zip(numbers, values, strict=True)]
        found = {(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}
        equal = found if equal is None else equal & found
    if equal:
        texts = " and ".join(repr(features.manifest.content.prompts[number][0][:80]) for number in min(equal))
        raise FeatureSetError(
            f"{features.path} has equal features under the prompts {texts}, so TDCL has nothing to contrast. Extract "
            "again with prompts that the model can distinguish, or set tdcl_weight to 0."
        )


def seen_images(features: FeatureSet) -> int:
    """Return how many of the data set's images the set's backbone was trained on, as far as is known."""
    return features.manifest.provenance.get("seen_images", 0)


def noise(features: FeatureSet) -> float:
    """Return the scale of the noise that was added to the set, in standard deviations; 0 without noise."""
    added = features.manifest.content.added_noise
    return added.scale if added else 0.0


def check_unseen(features: FeatureSet, allowed: bool) -> None:
    """Raise FeatureSetError if the set's backbone was trained on images of the data set, unless that is allowed."""
    if (seen := seen_images(features)) and not allowed:
        raise FeatureSetError(
            f"{features.path} was extracted by a backbone that was trained on {seen} of the data set's images, which "
            "gives guided methods an advantage. Train it on other images (prepare_backbone.corpus), or set "
            "train_fl.allow_seen_images to true and say so with the results."
        )


def _check_data(features: FeatureSet, dataset: PreparedDataset) -> None:
    """Compare class names and their order, which numbers the prompts, then pixels, labels and domains by their hash."""
    content, rows, path = features.manifest.content, features.manifest.rows, features.path
    theirs, ours, their_hash = content.class_names, dataset.class_names, content.dataset_hash
    difference = ""
    if len(theirs) != len(ours):
        difference = f"{path} was extracted for {len(theirs)} classes and {dataset.path} has {len(ours)}"
    elif theirs != ours:
        number = next(number for number, name in enumerate(theirs) if name != ours[number])
        order = ", the same classes in another order" if set(theirs) == set(ours) else ""
        difference = f"class {number} is {theirs[number]!r} in {path} and {ours[number]!r} in {dataset.path}{order}"
    elif (their_hash, rows) != (dataset.hash, dataset.rows("train")):
        difference = (
            f"{path} was extracted from another data set ({rows} images, hash {their_hash[:12]}) than "
            f"{dataset.path} ({dataset.rows('train')} images, hash {dataset.hash[:12]})"
        )
    if difference:
        raise FeatureSetError(f"{difference}. Prepare the data set that it was extracted from, {_OR_EXTRACT}")


def _different_settings(features: FeatureSet, config: Config) -> dict[str, tuple[Any, Any]]:
    """Return (the set's value, ours) by key of extract_features for all that differ, except prompts and files."""
    content, params = features.manifest.content, config.params.extract_features
    theirs: dict[str, Any] = {key: getattr(content, key) for key in _COMPARED}
    theirs |= {"version": content.extraction_version}
    theirs |= {"prompts": "class" if content.positive == "label" else "self-supervised"}
    if params.layers != "auto":
        theirs["layers"] = list(content.layers)
    widths = [stop - start for start, stop in content.layers.values()]
    channels = [len(features.basis().layers[layer].mean) for layer in content.layers]
    # No layer keeps more dimensions than it has channels.
    if len(widths) != len(params.dims) or widths != [min(pair) for pair in zip(params.dims, channels, strict=True)]:
        theirs["dims"] = widths
    if content.basis_sha256 is None:
        theirs |= {"basis": "auto", "basis_images": content.basis_images}
    if content.image_conditioning is None:
        theirs["image_conditioning"] = None
    return {key: (value, getattr(params, key)) for key, value in theirs.items() if value != getattr(params, key)}


def _different_prompts(features: FeatureSet, config: Config) -> dict[str, tuple[Any, Any]]:
    """Return the settings of the prompts that differ, or the first prompt that does.

    If the file that holds our texts is not here, only settings can be compared, and not which file they name. Sets
    made by older versions state no settings.
    """
    content, params = features.manifest.content, config.params.extract_features
    key = _FILES[params.prompts]
    file = getattr(params, key)
    here = file is None or config.path(file).exists()
    ours = prompts.build(params, content.class_names, config.path).texts if here else []
    if here and content.prompts == ours:
        return {}
    made_with = features.manifest.provenance.get("settings", {})
    keys = ["prompt_templates", *(["self_supervised_prompt"] if params.prompts == "self-supervised" else [])]
    if here or made_with.get(key, file) is None:
        keys.append(key)
    pairs = {key: (made_with[key], getattr(params, key)) for key in keys if key in made_with}
    different = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if here and not different:
        prompts_by_number = enumerate(zip_longest(content.prompts, ours))
        return next({f"prompt {number}": pair} for number, pair in prompts_by_number if pair[0] != pair[1])
    return different


def _check_files(features: FeatureSet, config: Config) -> None:
    """Compare a shared basis, the image encoder and the frozen model by their hashes, each if ours is here."""
    content, params = features.manifest.content, config.params.extract_features
    if sha256 := content.basis_sha256:
        file = config.path(params.basis)
        ours = provenance.file_sha256(file) if params.basis != "auto" and file.is_file() else None
        if params.basis == "auto" or ours not in (None, sha256):
            found = f"{params.basis} (SHA-256 {ours[:12]})" if ours else params.basis
            raise _other_file(features, f"a PCA basis from a file (SHA-256 {sha256[:12]})", "basis", found)
    if hashes := content.image_conditioning:
        if params.image_conditioning is None:
            raise _other_file(features, "an image encoder", "image_conditioning", "null")
        folder = config.path(params.image_conditioning)
        if folder.exists() and frozen_model.image_encoder_hashes(folder) != hashes:
            raise _other_file(features, "an image encoder", "image_conditioning", f"{folder}, whose files differ")
    if not config.backbone_manifest.exists():
        return
    model = frozen_model.read_manifest(config.backbone_manifest)
    files = {name: sha256 for name, sha256 in model.files.items() if name != "model_index.json"}
    if files != content.backbone:
        names = files.keys() | content.backbone.keys()
        file_name = min(name for name in names if files.get(name) != content.backbone.get(name))
        their_origin = _origin(features.manifest.provenance.get("backbone", {}))
        raise FeatureSetError(
            f"{features.path} was extracted with another frozen model ({their_origin}) than {config.backbone_manifest} "
            f"names ({_origin(model.origin())}): {file_name} differs. Set prepare_backbone to the set's model and run "
            f"`pipeline prepare-backbone`, {_OR_EXTRACT}"
        )


def _other_file(features: FeatureSet, theirs: str, key: str, ours: str) -> FeatureSetError:
    return FeatureSetError(
        f"{features.path} was extracted with {theirs}, but extract_features.{key} here is {ours}. Set the key "
        f"to the file that the set was made with (the file need not exist here), {_OR_EXTRACT}"
    )


def _origin(model: dict[str, Any]) -> str:
    return ", ".join(f"{key} {model.get(key)}" for key in ("name", "source", "revision"))
