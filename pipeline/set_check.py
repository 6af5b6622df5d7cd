"""Check that a feature set fits params.yaml, the prepared data set and the frozen model.

Feature sets are often received rather than extracted locally (`dvc pull`, another repository, a manual copy), or older
than the last change of params.yaml. Their manifest states data, settings and model, which are compared with the
project. Every mismatch is one line that names both sides and how to accept the set. Files that may be elsewhere are
compared only if they are present: the frozen model's manifest, and the files that settings name (`class_prompts`,
`negative_words`, `basis`, `image_conditioning`).
"""

from itertools import zip_longest
from typing import Any

from pipeline import provenance
from pipeline.data.datasets import PreparedDataset
from pipeline.diffusion import frozen_model, prompts
from pipeline.errors import FeatureSetError
from pipeline.feature_store import FeatureSet
from pipeline.settings.config import Config

_OR_EXTRACT = "or run `pipeline extract-features --overwrite`."
_COMPARED = ("timestep", "image_size", "denoise_prompt", "negatives", "noise_seed", "dtype", "storage")
_FILES = {"class": "class_prompts", "self-supervised": "negative_words"}  # the setting that names a file of texts


def check(features: FeatureSet, config: Config, dataset: PreparedDataset | None) -> None:
    """Compare a set with the project; without a data set, its images are not compared.

    Raises:
        FeatureSetError: The set was made from another data set or model, or with other settings.
    """
    if dataset:
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
            f"the set's values to use it, {_OR_EXTRACT}"
        )
    _check_files(features, config)


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
