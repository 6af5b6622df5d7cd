"""Check that a feature set fits the data set, the settings, the frozen model and the method before training.

Feature sets are often received rather than extracted locally (`dvc pull`, another repository, a manual copy). The
set's manifest states what it was made from, which is compared with the project. Every mismatch is one line that names
both sides and how to accept the set. Files that training does not need are compared only if they are present: the
frozen model's manifest, and the files that settings name (`class_prompts`, `negative_words`, `basis`,
`image_conditioning`).
"""

from itertools import zip_longest
from typing import Any

import numpy as np

from pipeline import provenance
from pipeline.data.datasets import PreparedDataset
from pipeline.diffusion import frozen_model, prompts
from pipeline.errors import FeatureSetError
from pipeline.feature_store import Basis, Content, FeatureSet, Manifest
from pipeline.settings.config import Config
from pipeline.settings.params import ExtractFeatures

_IMAGES_CHECKED = 16
_EXTRACT = "or run `pipeline extract-features --overwrite`"
_PLAIN = ("timestep", "image_size", "denoise_prompt", "negatives", "noise_seed", "dtype")
_FILES = {"class": "class_prompts", "self-supervised": "negative_words"}  # the setting that names a file of texts


def open_checked(config: Config, dataset: PreparedDataset) -> FeatureSet:
    """Open the feature set that params.yaml names; shards may be missing.

    Raises:
        FeatureSetError: There is none, or it was made from another data set or model, or with other settings.
    """
    features = FeatureSet(config.features_dir, partial=True)
    _check_data(features, dataset)
    _check_settings(features, config)
    _check_frozen_model(features, config)
    return features


def check_method(features: FeatureSet, method: str, without_labels: bool) -> None:
    """Check that the set's prompts suit the method.

    Raises:
        FeatureSetError: Training without labels would see prompts that name the class, or training with labels
            prompts that name none.
    """
    names_classes = features.manifest.content.positive == "label"
    if without_labels and names_classes:
        raise FeatureSetError(
            f"{features.path} was extracted with prompts that name each image's class, which training without labels "
            f"({method}) must not see: set extract_features.prompts to self-supervised and extract"
        )
    if not without_labels and not names_classes:
        raise FeatureSetError(
            f"{features.path} was extracted with self-supervised prompts, which name no class, but {method} trains "
            "with labels and is guided by the class's prompt: set extract_features.prompts to class and extract"
        )


def check_prompts_differ(features: FeatureSet, index: np.ndarray) -> None:
    """Check that images look different under their prompts, which TDCL contrasts.

    Sets that were extracted before such prompts were refused may have equal ones: every feature is then equal, so a few
    images tell.

    Args:
        features: The set.
        index: int64 (n,), positions in the training split that the run needs.

    Raises:
        FeatureSetError: All images looked at have equal features under two of their prompts; names them.
    """
    rows = features.read(np.sort(index)[:_IMAGES_CHECKED])
    equal: set[tuple[int, int]] | None = None
    for numbers, values in zip(rows.prompt_class.tolist(), rows.prompted, strict=True):
        first: dict[bytes, int] = {}
        pairs = [
            (first.setdefault(value.tobytes(), number), number) for number, value in zip(numbers, values, strict=True)
        ]
        found = {(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}
        equal = found if equal is None else equal & found
    for one, other in sorted(equal or ()):
        texts = " and ".join(repr(features.manifest.content.prompts[number][0][:80]) for number in (one, other))
        raise FeatureSetError(
            f"{features.path} has equal features under the prompts {texts}, so TDCL has nothing to contrast. Extract "
            "again with prompts that the model can tell apart, or set tdcl_weight to 0."
        )


def _check_data(features: FeatureSet, dataset: PreparedDataset) -> None:
    """Compare class names and their order, which numbers the prompts, then pixels, labels and domains by their hash."""
    manifest, accept = features.manifest, f"prepare the data set that it was extracted from, {_EXTRACT}"
    theirs, ours = manifest.content.class_names, dataset.class_names
    if len(theirs) != len(ours):
        raise FeatureSetError(
            f"{features.path} was extracted for {len(theirs)} classes and {dataset.path} has {len(ours)}: {accept}"
        )
    for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if their != our:
            order = ", the same classes in another order" if set(theirs) == set(ours) else ""
            raise FeatureSetError(
                f"class {number} is {their!r} in {features.path} and {our!r} in {dataset.path}{order}: {accept}"
            )
    hashes, rows = (manifest.content.dataset_hash, dataset.hash), (manifest.rows, dataset.rows("train"))
    if hashes[0] != hashes[1] or rows[0] != rows[1]:
        raise FeatureSetError(
            f"{features.path} was extracted from another data set ({rows[0]} images, hash {hashes[0][:12]}) than "
            f"{dataset.path} ({rows[1]} images, hash {hashes[1][:12]}): {accept}"
        )


def _check_settings(features: FeatureSet, config: Config) -> None:
    """First the settings that params.yaml can adopt from the set, then the contents of files."""
    manifest, params = features.manifest, config.params.extract_features
    different = _differences(manifest.content, params, features.basis())
    if "prompts" not in different:
        different |= _prompt_differences(manifest, config)
    if different:
        theirs = ", ".join(f"{key} {_as_yaml(their)}" for key, (their, _) in different.items())
        ours = ", ".join(f"{key} {_as_yaml(our)}" for key, (_, our) in different.items())
        raise FeatureSetError(
            f"{features.path} was extracted with {theirs}, but extract_features here has {ours}: give params.yaml "
            f"the set's values to train from it, {_EXTRACT}"
        )
    for difference in (_basis_difference(manifest.content, config), _encoder_difference(manifest.content, config)):
        if difference:
            raise FeatureSetError(f"{features.path} was extracted with {difference}, {_EXTRACT}")


def _differences(content: Content, params: ExtractFeatures, basis: Basis) -> dict[str, tuple[Any, Any]]:
    """Return (the set's value, ours) by key of extract_features for all that differ, except prompts and files."""
    values = {key: (getattr(content, key), getattr(params, key)) for key in _PLAIN}
    values["version"] = (content.extraction_version, params.version)
    values["prompts"] = ("class" if content.positive == "label" else "self-supervised", params.prompts)
    if params.layers != "auto":
        values["layers"] = (list(content.layers), params.layers)
    widths = [stop - start for start, stop in content.layers.values()]
    channels = [len(basis.layers[layer].mean) for layer in content.layers]
    if len(widths) != len(params.dims) or widths != [min(pair) for pair in zip(params.dims, channels, strict=True)]:
        values["dims"] = (widths, params.dims)
    if content.basis_sha256 is None:
        values |= {"basis": ("auto", params.basis), "basis_images": (content.basis_images, params.basis_images)}
    if content.image_conditioning is None:
        values["image_conditioning"] = (None, params.image_conditioning)
    return _unequal(values)


def _prompt_differences(manifest: Manifest, config: Config) -> dict[str, tuple[Any, Any]]:
    """Return the settings of the prompts that differ, or the first prompt that does.

    If the file that holds our texts is not here, only settings can be compared, and not which file they name. Sets
    made by older versions state no settings.
    """
    content, params = manifest.content, config.params.extract_features
    key = _FILES[params.prompts]
    file = getattr(params, key)
    here = file is None or config.path(file).exists()
    ours = prompts.build(params, content.class_names, config.path).texts if here else []
    if here and content.prompts == ours:
        return {}
    made_with = manifest.provenance.get("settings", {})
    keys = ["prompt_templates", *(["self_supervised_prompt"] if params.prompts == "self-supervised" else [])]
    if here or made_with.get(key, file) is None:
        keys.append(key)
    different = _unequal({key: (made_with[key], getattr(params, key)) for key in keys if key in made_with})
    if different or not here:
        return different
    pairs = enumerate(zip_longest(content.prompts, ours))
    return next({f"prompt {number}": pair} for number, pair in pairs if pair[0] != pair[1])


def _basis_difference(content: Content, config: Config) -> str | None:
    """Describe how a shared basis differs from ours, if our file is here."""
    if content.basis_sha256 is None:
        return None
    ours = config.params.extract_features.basis
    file, difference = config.path(ours), "is auto" if ours == "auto" else ""
    if not difference and file.is_file() and (sha256 := provenance.file_sha256(file)) != content.basis_sha256:
        difference = f"is {ours} (SHA-256 {sha256[:12]})"
    if not difference:
        return None
    return (
        f"a PCA basis from a file (SHA-256 {content.basis_sha256[:12]}), but extract_features.basis here {difference}: "
        "name that file there (it need not be here)"
    )


def _encoder_difference(content: Content, config: Config) -> str | None:
    """Describe how the image encoder differs from ours, if ours is here."""
    path = config.params.extract_features.image_conditioning
    theirs, folder = content.image_conditioning, config.path(path) if path else None
    if theirs is None or (folder and not folder.exists()):
        return None
    if folder and frozen_model.image_encoder_hashes(folder) == theirs:
        return None
    ours = f"{folder}, whose files differ" if folder else "null"
    return (
        f"an image encoder, but extract_features.image_conditioning here is {ours}: name the set's there (it need not "
        "be here)"
    )


def _unequal(pairs: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _as_yaml(value: Any) -> str:
    return "null" if value is None else repr(value)


def _check_frozen_model(features: FeatureSet, config: Config) -> None:
    """Compare the hashes of the model's files, if its manifest is here."""
    if not config.backbone_manifest.exists():
        return
    ours = frozen_model.read_manifest(config.backbone_manifest)
    content = features.manifest.content.backbone
    files = {name: sha256 for name, sha256 in ours.files.items() if name != "model_index.json"}
    if files != content:
        file = min(name for name in files.keys() | content.keys() if files.get(name) != content.get(name))
        made_by = features.manifest.provenance.get("backbone", {})
        raise FeatureSetError(
            f"{features.path} was extracted with another frozen model ({_model(made_by)}) than "
            f"{config.backbone_manifest} names ({_model(ours.origin())}): {file} differs; set prepare_backbone to "
            f"the set's model and run `pipeline prepare-backbone`, {_EXTRACT}"
        )


def _model(described: dict[str, Any]) -> str:
    return ", ".join(f"{key} {described.get(key)}" for key in ("name", "source", "revision"))
