"""Check that a feature set fits the project (`pipeline.set_check`) and the method before training."""

import logging

import numpy as np

from pipeline import set_check
from pipeline.data.datasets import PreparedDataset
from pipeline.errors import FeatureSetError
from pipeline.feature_store import FeatureSet
from pipeline.settings.config import Config
from pipeline.settings.params import Guidance

log = logging.getLogger(__name__)

_IMAGES_CHECKED = 16


def open_checked(config: Config, dataset: PreparedDataset) -> FeatureSet:
    """Open the feature set that params.yaml names; shards may be missing. A set with noise fits as its source does.

    Raises:
        FeatureSetError: There is none; it was made from another data set or model, or with other settings; or by a
            backbone that was trained on images of the data set, and the settings do not allow it.
    """
    features = FeatureSet(config.features_dir, partial=True)
    check_unseen(features, config.params.train_fl.allow_seen_images)
    set_check.check(features, config, dataset)
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
