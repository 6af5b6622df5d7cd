"""The feature set that guides a run: opened only if it fits the data set, the settings, the model and the method.

A set is received as often as it is made: by `dvc pull`, from another repository, by hand. Its manifest says what it was
made of, and all of that is held against what is here, before any training. Every mismatch is one line that names both
sides and how to accept the set. What is not here cannot differ: the frozen model's manifest, and the files that keys
name (`class_prompts`, `negative_words`, `basis`, `image_conditioning`), are no part of what a member needs to train.
"""

from itertools import zip_longest
from typing import Any

import numpy as np

from pipeline import provenance
from pipeline.data.datasets import PreparedDataset
from pipeline.diffusion import frozen_model, prompts
from pipeline.errors import PipelineError
from pipeline.feature_store import Basis, Content, FeatureSet
from pipeline.settings.config import Config
from pipeline.settings.params import ExtractFeatures

_LOOKED_AT = 16
_EXTRACT = "or run `pipeline extract-features --overwrite`"
_PLAIN = ("timestep", "image_size", "denoise_prompt", "negatives", "noise_seed", "dtype")
_FILES = {"class": "class_prompts", "self-supervised": "negative_words"}  # what names the file of texts


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


def check_prompts_differ(features: FeatureSet, index: np.ndarray) -> None:
    """Checks that images look different under their prompts, which TDCL contrasts.

    Sets that were extracted before such prompts were refused may have equal ones: every feature is then equal, so a few
    images tell.

    Args:
        features: The set.
        index: int64 (n,), positions in the training split that the run needs.

    Raises:
        PipelineError: All images looked at have equal features under two of their prompts; names them.
    """
    rows = features.read(np.sort(index)[:_LOOKED_AT])
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
        raise PipelineError(
            f"{features.path} has equal features under the prompts {texts}, so TDCL has nothing to contrast. Extract "
            "again with prompts that the model can tell apart, or set tdcl_weight to 0."
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
    """First what params.yaml can be given to take the set as it is, then what came from files."""
    content, params = features.manifest.content, config.params.extract_features
    different = _differences(content, params, features.basis())
    foreign = _foreign_prompt(content, config) if "prompts" not in different else None
    if foreign is not None:
        different |= _prompt_settings(content, params)
    if different:
        theirs = ", ".join(f"{key} {_as_yaml(their)}" for key, (their, _) in different.items())
        ours = ", ".join(f"{key} {_as_yaml(our)}" for key, (_, our) in different.items())
        raise PipelineError(
            f"{features.path} was extracted with {theirs}, but extract_features here has {ours}: give params.yaml "
            f"the set's values to train from it, {_EXTRACT}"
        )
    prompt = None if foreign is None else _described(foreign, content, params)
    for difference in (prompt, _basis_difference(content, config), _encoder_difference(content, config)):
        if difference:
            raise PipelineError(f"{features.path} was extracted with {difference}, {_EXTRACT}")


def _differences(content: Content, params: ExtractFeatures, basis: Basis) -> dict[str, tuple[Any, Any]]:
    """Key of extract_features -> (the set's value, ours), of all that differ; but for prompts and files."""
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


def _foreign_prompt(content: Content, config: Config) -> int | None:
    """The number of the set's first prompt that is not what the settings make; None if all are, as far as is known.

    Of texts from a file that is not here it is known that templates alone did not make them all, and self-supervised
    that every negative is of the templates by some word.
    """
    params = config.params.extract_features
    key = _FILES[params.prompts]
    file = getattr(params, key)
    here = file is None or config.path(file).exists()
    known = params if here else params.model_copy(update={key: None})
    ours = prompts.build(known, content.class_names, config.path).texts
    if here:
        pairs = enumerate(zip_longest(content.prompts, ours))
        return next((number for number, (their, our) in pairs if their != our), None)
    if content.prompts == ours:
        return 0
    if params.prompts == "class":
        return None
    first, *negatives = content.prompts
    fit = [first == ours[0], *(prompts.are_of(params.prompt_templates, texts) for texts in negatives)]
    return None if all(fit) else fit.index(False)


def _prompt_settings(content: Content, params: ExtractFeatures) -> dict[str, tuple[Any, Any]]:
    """The keys that a set's prompts show to be others than ours; those from a file do not show what made them."""
    key, texts, names = _FILES[params.prompts], content.prompts, content.class_names
    pairs: dict[str, tuple[Any, Any]] = {}
    if params.prompts == "self-supervised":
        texts, names = texts[1:], prompts.tiny_imagenet_words()
        for text in sum(content.prompts[:1], []):
            pairs["self_supervised_prompt"] = (text, params.self_supervised_prompt)
    if templates := prompts.templates_of(texts, names):
        pairs |= {"prompt_templates": (templates, params.prompt_templates), key: (None, getattr(params, key))}
    return _unequal(pairs)


def _described(foreign: int, content: Content, params: ExtractFeatures) -> str:
    has = content.prompts[foreign : foreign + 1]
    keys = ["prompt_templates", _FILES[params.prompts]]
    ours = " and ".join(f"{key} {_as_yaml(getattr(params, key))}" for key in keys)
    return (
        f"{f'the prompt {has[0]}' if has else f'{foreign} prompts only'}, which extract_features here does not make of "
        f"{ours}: give them what they had there (a file need not be here)"
    )


def _basis_difference(content: Content, config: Config) -> str | None:
    """A basis that was given: by the same file, where it is here."""
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
    """An image encoder: the same, where it is here."""
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
    """By the hashes of its files, where the model's manifest is here."""
    if not config.backbone_manifest.exists():
        return
    ours = frozen_model.read_manifest(config.backbone_manifest)
    content = features.manifest.content.backbone
    files = {name: sha256 for name, sha256 in ours.files.items() if name != "model_index.json"}
    if files != content:
        file = min(name for name in files.keys() | content.keys() if files.get(name) != content.get(name))
        made_by = features.manifest.provenance.get("backbone", {})
        raise PipelineError(
            f"{features.path} was extracted with another frozen model ({_model(made_by)}) than "
            f"{config.backbone_manifest} names ({_model(ours.origin())}): {file} differs; set prepare_backbone to "
            f"the set's model and run `pipeline prepare-backbone`, {_EXTRACT}"
        )


def _model(described: dict[str, Any]) -> str:
    return ", ".join(f"{key} {described.get(key)}" for key in ("name", "source", "revision"))
