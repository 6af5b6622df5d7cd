"""Runs the stage: what the cached feature set holds, layer by layer; no frozen model is needed.

analysis/features.json   the whole set in two numbers, each a column of `dvc metrics show`
analysis/details.json    per layer and for their fusion: linear probe, clusters, and the margin of matching prompts
analysis/clusters.svg    probe accuracy, purity, NMI and ARI per layer (the paper's Fig. 3)
analysis/tsne.svg        t-SNE of the denoising representations (Fig. 2)
analysis/prompts.svg     class x nearest prompt, and the margin per class

probes.py    linear probe and clusters
margins.py   matching against non-matching prompts
tsne.py      t-SNE of the representations
figures.py   figures
sweep/       timesteps and layers on a sample, through the frozen model, and a recommendation

Everything is of training images, at most `images` of them.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import seeding
from pipeline.errors import PipelineError
from pipeline.feature_store import Features, FeatureSet
from pipeline.io import atomic
from pipeline.progress import track
from pipeline.settings.config import Config
from pipeline.settings.params import AnalyzeFeatures
from stages.analyze_features import figures, margins, tsne
from stages.analyze_features.margins import Similarities
from stages.analyze_features.probes import ProbeEvaluator, chance

log = logging.getLogger(__name__)

FUSED = "fused"
"""All columns of the set: its layers, one after the other."""


def run(config: Config) -> Path:
    """Analyses the feature set that params.yaml describes.

    Returns:
        analysis/details.json.

    Raises:
        PipelineError: the set is missing or damaged, or has too few images or prompts.
    """
    params = config.params.analyze_features
    features = FeatureSet(config.features_dir)
    content = features.manifest.content
    if features.manifest.prompts_per_image < 2:
        raise PipelineError(f"{features.path} has one prompt an image: there are no others to compare it with")
    rows = _read_sample(features, params.images, params.seed)
    columns = {layer: slice(*span) for layer, span in content.layers.items()} | {FUSED: slice(0, content.num_dims)}
    similar = {name: _similarities(features, rows, part) for name, part in columns.items()}
    scores = _scores(rows, columns, similar, params)
    by_chance = chance(rows.label, features.manifest.prompts_per_image, params.seed)
    folder = config.root / "analysis"
    folder.mkdir(exist_ok=True)
    for name in ("features.json", "details.json"):  # details.json vouches for the pictures: it comes last
        (folder / name).unlink(missing_ok=True)
    atomic.write_text(folder / "clusters.svg", figures.bars(scores, by_chance))
    _draw(folder, features, rows, columns, similar[FUSED], params)
    atomic.write_json(folder / "features.json", _summary(scores[FUSED]))
    details = {
        "feature_set": {"name": features.path.name, "fingerprint": features.manifest.fingerprint},
        "timestep": content.timestep,
        "images": len(rows.label),
        "chance": by_chance,
        "layers": scores,
        "classes": {
            content.class_names[label]: similar[FUSED].means(rows.label == label) for label in np.unique(rows.label)
        },
    }
    atomic.write_json(folder / "details.json", details)
    return folder / "details.json"


def _summary(fused: dict[str, Any]) -> dict[str, float]:
    """What one compares sets by, under short names that keep the table of all metrics narrow.

    Returns:
        probe: the linear probe's accuracy, 0 to 1, which NDCR's targets gain from; margin: that of the matching prompt,
        a difference of cosines, which TDCL works with.
    """
    return {"probe": fused["probe_accuracy"], "margin": fused["margin"]}


def _read_sample(features: FeatureSet, count: int, seed: int) -> Features:
    """At most `count` rows."""
    order = seeding.numpy_generator(seed, "analysed images").permutation(features.manifest.rows)
    return features.read(np.sort(order[:count]))


def _similarities(features: FeatureSet, rows: Features, part: slice) -> Similarities:
    return margins.similarities(rows.denoised[:, part], rows.prompted[:, :, part], features.positive_prompts(rows))


def _scores(
    rows: Features, columns: dict[str, slice], similar: dict[str, Similarities], params: AnalyzeFeatures
) -> dict[str, dict[str, Any]]:
    """Layer -> its numbers in details.json."""
    evaluator, everyone = ProbeEvaluator(rows.label, params), np.ones(len(rows.label), bool)
    found = {}
    for name, part in track(columns.items(), "analyze", len(columns), "layer"):
        dims = part.stop - part.start
        found[name] = {
            "dims": dims,
            **asdict(evaluator.scores(rows.denoised[:, part])),
            **similar[name].means(everyone),
        }
        log.info("%s: %d dims, linear probe %.2f %%", name, dims, 100 * found[name]["probe_accuracy"])
    return found


def _draw(
    folder: Path,
    features: FeatureSet,
    rows: Features,
    columns: dict[str, slice],
    similar: Similarities,
    params: AnalyzeFeatures,
) -> None:
    content = features.manifest.content
    shown = tsne.choose(len(rows.label), params)
    embedded = {name: tsne.embed(rows.denoised[shown, part], params) for name, part in columns.items()}
    share = margins.confusion(
        similar.nearest(), rows.prompt_class, rows.label, len(content.class_names), len(content.prompts)
    )
    prompts = [texts[0] for texts in content.prompts]
    own = [similar.margins()[rows.label == label] for label in range(len(content.class_names))]
    atomic.write_text(folder / "tsne.svg", figures.scatter(embedded, rows.label[shown], content.class_names))
    atomic.write_text(folder / "prompts.svg", figures.confusion(share, prompts, own, content.class_names))
