"""Analyse the cached feature set layer by layer, without a frozen model.

analysis/features.json   two numbers for the set, each a column of `dvc metrics show`
analysis/details.json    per layer and for their fusion: linear probe, clusters, and the margin of matching prompts
analysis/clusters.svg    probe accuracy, purity, NMI and ARI per layer (the paper's Fig. 3)
analysis/tsne.svg        t-SNE of the denoising representations (Fig. 2)
analysis/prompts.svg     class x nearest prompt, and the margin per class

probes.py    linear probe and clusters
margins.py   matching against non-matching prompts
tsne.py      t-SNE of the representations
figures.py   figures
sweep/       timesteps and layers on a sample, through the frozen model, and a recommendation

Only training images are used, at most `images` of them.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import seeding, set_check
from pipeline.data.datasets import PreparedDataset
from pipeline.errors import PipelineError
from pipeline.feature_store import Content, Features, FeatureSet
from pipeline.io import atomic
from pipeline.progress import track
from pipeline.settings.config import Config
from pipeline.settings.params import AnalyzeFeatures
from stages.analyze_features import margins, tsne
from stages.analyze_features.margins import Similarities
from stages.analyze_features.probes import ProbeEvaluator, chance

log = logging.getLogger(__name__)

_LEAST_SEPARATION = 0.001  # guides with less than 0.00003 gave small gains, those with more than 0.01 large ones

FUSED = "fused"
"""All columns of the set: its layers, one after the other."""


def run(config: Config) -> Path:
    """Analyse the feature set that params.yaml describes, and return analysis/details.json.

    Raises:
        PipelineError: The set is missing or damaged, or has too few images or prompts.
    """
    from stages.analyze_features import figures  # needs matplotlib, the other modules do not

    params = config.params.analyze_features
    features = FeatureSet(config.features_dir)
    content = features.manifest.content
    if features.manifest.prompts_per_image < 2:
        raise PipelineError(
            f"{features.path} has one prompt per image, so that there are no others to compare it with. Extract "
            "features with extract_features.negatives of 1 or more."
        )
    _warn_if_other(features, config)
    order = seeding.numpy_generator(params.seed, "analysed images").permutation(features.manifest.rows)
    rows = features.read(np.sort(order[: params.images]))
    columns = {layer: slice(*span) for layer, span in content.layers.items()} | {FUSED: slice(0, content.num_dims)}
    positive = features.positive_prompts(rows)
    similar = {
        name: margins.similarities(rows.denoised[:, part], rows.prompted[:, :, part], positive)
        for name, part in columns.items()
    }
    by_chance = chance(rows.label, features.manifest.prompts_per_image, params.seed)
    scores = _scores(rows, columns, similar, params, by_chance["probe_accuracy"])
    verdict = _verdict(scores[FUSED], by_chance)
    if content.added_noise:
        noise = content.added_noise
        text = f"The set has {noise}, of which these numbers are, too: analyse the set that it was made from."
        verdict = [(logging.WARNING, text)]
    for level, text in verdict:
        log.log(level, "%s", text)
    folder = config.root / "analysis"
    folder.mkdir(exist_ok=True)
    for name in ("features.json", "details.json"):  # details.json is written last: it marks the figures as complete
        (folder / name).unlink(missing_ok=True)
    atomic.write_text(folder / "clusters.svg", figures.bars(scores, by_chance))
    _draw(folder, content, rows, columns, similar[FUSED], params)
    # The probe's accuracy is for NDCR, the margin for TDCL; short names keep the metrics table narrow.
    summary = {"probe": scores[FUSED]["probe_accuracy"], "margin": scores[FUSED]["margin"]}
    atomic.write_json(folder / "features.json", summary)
    details = {
        "feature_set": {"name": features.path.name, "fingerprint": features.manifest.fingerprint},
        "timestep": content.timestep,
        "images": len(rows.label),
        "verdict": [text for _, text in verdict],
        "chance": by_chance,
        "layers": scores,
        "classes": {
            content.class_names[label]: similar[FUSED].means(rows.label == label) for label in np.unique(rows.label)
        },
    }
    atomic.write_json(folder / "details.json", details)
    return folder / "details.json"


def _warn_if_other(features: FeatureSet, config: Config) -> None:
    """Warn if the set was made with other settings or images than params.yaml and the prepared data have."""
    try:
        has_data = (config.dataset_dir / "manifest.json").exists()
        set_check.check(features, config, PreparedDataset(config.dataset_dir) if has_data else None)
    except PipelineError as error:  # also of a damaged data set, which the analysis does not need
        log.warning("%s", error)


def _scores(
    rows: Features,
    columns: dict[str, slice],
    similar: dict[str, Similarities],
    params: AnalyzeFeatures,
    probe_by_chance: float,
) -> dict[str, dict[str, Any]]:
    """Return, by layer, its numbers in details.json."""
    evaluator, everyone = ProbeEvaluator(rows.label, params), np.ones(len(rows.label), bool)
    found = {}
    for name, part in track(columns.items(), "analyze", len(columns), "layer"):
        dims = part.stop - part.start
        scores = evaluator.scores(rows.denoised[:, part])
        found[name] = {"dims": dims, **asdict(scores), **similar[name].means(everyone)}
        probe = found[name]["probe_accuracy"]
        log.info("%s: %d dims, linear probe %.2f %% (chance %.2f %%)", name, dims, 100 * probe, 100 * probe_by_chance)
    return found


def _verdict(fused: dict[str, Any], by_chance: dict[str, float]) -> list[tuple[int, str]]:
    """Say what the two losses can build on, as log levels and sentences.

    docs/reproduction.md has the measurements behind them: gains by guides of different quality.
    """
    probe, least = fused["probe_accuracy"], by_chance["probe_accuracy"]
    reached = (
        f"a linear probe reaches {100 * probe:.1f} ± {100 * fused['probe_error']:.1f} % (chance {100 * least:.1f} %)"
    )
    if probe - 2 * fused["probe_error"] > least:
        found = [
            (logging.INFO, f"The representations, with which NDCR aligns, tell something of the classes: {reached}.")
        ]
    else:
        text = (
            f"The representations, with which NDCR aligns, tell nothing of the classes: {reached}. With the default "
            "weights, guidance gained least with such features (digits). Choose another timestep or other layers "
            "(`pipeline sweep-features`) or another model."
        )
        found = [(logging.WARNING, text)]
    separation = fused["separation"]
    if separation >= _LEAST_SEPARATION:
        found.append((logging.INFO, f"The model tells prompts apart (separation {separation:.4f}), which TDCL needs."))
    else:
        text = (
            f"The model hardly tells prompts apart (separation {separation:.2g}, below {_LEAST_SEPARATION:g}): TDCL "
            "can add little to training. Choose another timestep, other layers or a model that was trained longer, or "
            "use NDCR alone (tdcl_weight: 0)."
        )
        found.append((logging.WARNING, text))
    nearest, error = fused["matching_nearest"], fused["nearest_error"]
    share = f"The matching prompt is the nearest for {100 * nearest:.1f} ± {100 * error:.1f} % of the images"
    by_prompts = 100 * by_chance["matching_nearest"]
    if 100 * (nearest + 2 * error) < by_prompts:
        found.append((logging.WARNING, f"{share}, less often than by chance ({by_prompts:.1f} %): check the prompts."))
    else:
        found.append((logging.INFO, f"{share} (chance {by_prompts:.1f} %)."))
    return found


def _draw(
    folder: Path,
    content: Content,
    rows: Features,
    columns: dict[str, slice],
    similar: Similarities,
    params: AnalyzeFeatures,
) -> None:
    from stages.analyze_features import figures

    shown = tsne.choose(len(rows.label), params)
    embedded = {name: tsne.embed(rows.denoised[shown, part], params) for name, part in columns.items()}
    share = margins.confusion(
        similar.nearest(), rows.prompt_class, rows.label, len(content.class_names), len(content.prompts)
    )
    prompts = [texts[0] for texts in content.prompts]
    own = [similar.margins()[rows.label == label] for label in range(len(content.class_names))]
    atomic.write_text(folder / "tsne.svg", figures.scatter(embedded, rows.label[shown], content.class_names))
    atomic.write_text(folder / "prompts.svg", figures.confusion(share, prompts, own, content.class_names))
