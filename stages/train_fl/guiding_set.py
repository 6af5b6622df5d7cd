"""The feature set that guides a run: opened only if it fits the data set, the settings, the model and the method.

A set is received as often as it is made: by `dvc pull`, from another repository, by hand. Its manifest says what it was
made of, and all of that is held against what is here, before any training. Every mismatch is one line that names both
sides and how to accept the set. What is not here cannot differ: the frozen model's manifest, and the files that keys
name (`class_prompts`, `negative_words`), are no part of what a member needs for training.
"""

from itertools import zip_longest
from typing import Any

from pipeline import frozen_model, provenance
from pipeline.config import Config
from pipeline.datasets import PreparedDataset
from pipeline.errors import PipelineError
from pipeline.feature_store import Basis, Content, FeatureSet
from pipeline.params import ExtractFeatures

_EXTRACT = "or run `pipeline extract-features`"
_PLAIN = ("timestep", "image_size", "denoise_prompt", "negatives", "noise_seed", "dtype")


def open_checked(config: Config, dataset: PreparedDataset) -> FeatureSet:
    """The feature set that params.yaml names; shards may be missing.

    Raises:
        PipelineError: there is none, or it was made of another data set, with other settings or another frozen model.
    """
    features = FeatureSet(config.features_dir, partial=True)
    _check_data(features, dataset)
    _check_settings(features, config)
    _check_frozen_model(features, config)
    return features


def check_method(features: FeatureSet, method: str, without_labels: bool) -> None:
    """Checks that the prompts are those of the method.

    Raises:
        PipelineError: training without labels would see prompts that name the class, or training with labels would be
            guided by prompts that name none.
    """
    names_classes = features.manifest.content.positive == "label"
    if without_labels and names_classes:
        raise PipelineError(
            f"{features.path} was extracted with prompts that name each image's class, which training without labels "
            f"({method}) must not see: set extract_features.prompts to self-supervised and extract"
        )
    if not without_labels and not names_classes:
        raise PipelineError(
            f"{features.path} was extracted with self-supervised prompts, which name no class, but {method} trains "
            "with labels and is guided by the class's prompt: set extract_features.prompts to class and extract"
        )


def _check_data(features: FeatureSet, dataset: PreparedDataset) -> None:
    """Class names in their order, which the prompts are numbered by, then pixels, labels and domains by their hash."""
    manifest, accept = features.manifest, f"prepare the data set that it was extracted from, {_EXTRACT}"
    theirs, ours = manifest.content.class_names, dataset.class_names
    if len(theirs) != len(ours):
        raise PipelineError(
            f"{features.path} was extracted for {len(theirs)} classes and {dataset.path} has {len(ours)}: {accept}"
        )
    for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if their != our:
            order = ", the same classes in another order" if set(theirs) == set(ours) else ""
            raise PipelineError(
                f"class {number} is {their!r} in {features.path} and {our!r} in {dataset.path}{order}: {accept}"
            )
    hashes, rows = (manifest.content.dataset_hash, dataset.hash), (manifest.rows, dataset.rows("train"))
    if hashes[0] != hashes[1] or rows[0] != rows[1]:
        raise PipelineError(
            f"{features.path} was extracted from another data set ({rows[0]} images, hash {hashes[0][:12]}) than "
            f"{dataset.path} ({rows[1]} images, hash {hashes[1][:12]}): {accept}"
        )


def _check_settings(features: FeatureSet, config: Config) -> None:
    content, params = features.manifest.content, config.params.extract_features
    different = _differences(content, params, features.basis()) | _basis_difference(content, config)
    if different:
        theirs = ", ".join(f"{key} {their!r}" for key, (their, _) in different.items())
        ours = ", ".join(f"{key} {our!r}" for key, (_, our) in different.items())
        raise PipelineError(
            f"{features.path} was extracted with {theirs}, but extract_features here has {ours}: give params.yaml "
            f"the set's values to train from it, {_EXTRACT}"
        )


def _differences(content: Content, params: ExtractFeatures, basis: Basis) -> dict[str, tuple[Any, Any]]:
    """Key of extract_features -> (the set's value, ours), of all that differ."""
    values = {key: (getattr(content, key), getattr(params, key)) for key in _PLAIN}
    values["version"] = (content.extraction_version, params.version)
    values["prompts"] = ("class" if content.positive == "label" else "self-supervised", params.prompts)
    if params.layers != "auto":
        values["layers"] = (list(content.layers), params.layers)
    widths = [stop - start for start, stop in content.layers.values()]
    channels = [len(basis.layers[layer].mean) for layer in content.layers]
    if len(widths) != len(params.dims) or widths != [min(pair) for pair in zip(params.dims, channels, strict=True)]:
        values["dims"] = (widths, params.dims)
    conditioned = "an image encoder" if content.image_conditioning else None
    if (conditioned is None) != (params.image_conditioning is None):
        values["image_conditioning"] = (conditioned, params.image_conditioning)
    if values["prompts"][0] == values["prompts"][1]:
        values |= _text_difference(content, params)
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def _text_difference(content: Content, params: ExtractFeatures) -> dict[str, tuple[Any, Any]]:
    """The first prompt whose texts are not what the templates make; those from files are taken as they are."""
    templates = params.prompt_templates
    if params.prompts == "self-supervised":
        ours = [[params.self_supervised_prompt]]
        texts = content.prompts[:1]
        kind = "self_supervised_prompt"
    elif params.class_prompts is None:
        ours = [[text.replace("{class_name}", name) for text in templates] for name in content.class_names]
        texts, kind = content.prompts, "prompt_templates"
    else:
        return {}
    return next(({kind: pair} for pair in zip_longest(texts, ours) if pair[0] != pair[1]), {})


def _basis_difference(content: Content, config: Config) -> dict[str, tuple[Any, Any]]:
    """Fitted here and there on as many images, or given: then by the same file, where it is here."""
    params = config.params.extract_features
    file = config.root / params.basis
    if content.basis_sha256 is None and params.basis == "auto":
        same, key = content.basis_images == params.basis_images, "basis_images"
        return {} if same else {key: (content.basis_images, params.basis_images)}
    given = f"the file {content.basis_sha256[:12]}" if content.basis_sha256 else "auto"
    same = content.basis_sha256 is not None and params.basis != "auto"
    if same and file.is_file() and provenance.file_sha256(file) != content.basis_sha256:
        same = False
    return {} if same else {"basis": (given, params.basis)}


def _check_frozen_model(features: FeatureSet, config: Config) -> None:
    """By the hashes of its files, where the model's manifest is here."""
    if not config.backbone_manifest.exists():
        return
    ours = frozen_model.read_manifest(config)
    content = features.manifest.content.backbone
    files = {name: sha256 for name, sha256 in ours["files"].items() if name != "model_index.json"}
    if files != content:
        file = min(name for name in files.keys() | content.keys() if files.get(name) != content.get(name))
        made_by = features.manifest.provenance.get("backbone", {})
        raise PipelineError(
            f"{features.path} was extracted with another frozen model ({_model(made_by)}) than "
            f"{config.backbone_manifest} names ({_model(ours)}): {file} differs; set prepare_backbone to the set's "
            f"model and run `pipeline prepare-backbone`, {_EXTRACT}"
        )


def _model(described: dict[str, Any]) -> str:
    return ", ".join(f"{key} {described.get(key)}" for key in ("name", "source", "revision"))
