"""Sweep timesteps and layers on a sample of training images, and recommend a choice (the paper's Fig. 6).

analysis/sweep/sweep.csv         timestep, layers, dims, linear probe, purity, NMI, ARI, margins; one row per candidate
analysis/sweep/sweep.json        the same rows, the recommendation, and the settings
analysis/sweep/sweep.svg         every measure against the timestep
analysis/sweep/maps-<i>.png      image i of the training split: its maps' principal components as colours (Fig. 4)
analysis/sweep/recommended.yaml  a preset
.pipeline/sweep/<key>            the result of each timestep, for the next sweep; `make clean` removes it

plan.py       the work to do
sample.py     passes of the frozen model: every image once per timestep, some once more for each of their prompts
recommend.py  the choice of one candidate, and its description
cache.py      results of finished timesteps
publish.py    the output; figures.py draws

The features of a sweep are not reused: an extraction fits its PCA basis on more images, and stores float16.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.diffusion import backbones, batching, frozen_model
from pipeline.diffusion.session import FrozenSession
from pipeline.io import locks
from pipeline.progress import progress_bar
from pipeline.settings.config import Config
from stages.analyze_features import margins
from stages.analyze_features.probes import ProbeEvaluator
from stages.analyze_features.sweep import plan as planning
from stages.analyze_features.sweep import publish, recommend
from stages.analyze_features.sweep.cache import SweepResult
from stages.analyze_features.sweep.plan import SweepPlan
from stages.analyze_features.sweep.recommend import Candidate
from stages.analyze_features.sweep.sample import LayerFeatures, Sample

log = logging.getLogger(__name__)


def run(config: Config) -> Path:
    """Sweep as params.yaml says, reusing the timesteps that an earlier sweep finished; needs no model if all are.

    Returns:
        analysis/sweep/recommended.yaml.

    Raises:
        PipelineError: The data set or the model is missing or changed, the sample is too small, or another process
            is sweeping.
    """
    target = config.root / "analysis" / "sweep"
    with locks.held(config.state_dir / "locks" / "sweep", str(target)):
        plan = planning.make(config)
        for line in plan.lines():
            log.info("%s", line)
        swept = dict(sorted((plan.done | _sweep(plan)).items())) if plan.missing else plan.done
        candidates = [candidate for found in swept.values() for candidate in found.candidates]
        choice = recommend.choose(candidates, plan.params.standard_errors)
        publish.write(target, plan, swept, choice)
        plan.cache.remove_others()
    for line in [*recommend.in_words(choice), *recommend.hint(choice, len(plan.data) - len(plan.index))]:
        log.info("%s", line)
    log.info("To use it, run: pipeline preset %s", target / publish.PRESET)
    return target / publish.PRESET


def _sweep(plan: SweepPlan) -> dict[int, SweepResult]:
    """Check the model, and compute and cache the missing timesteps."""
    frozen_model.read_checked(plan.backbone_manifest, plan.model_dir)
    found = {}
    with batching.reproducible(plan.device, getattr(torch, plan.settings.dtype)):
        how = plan.settings, plan.runtime, plan.device, plan.image_encoder
        session = FrozenSession(plan.model_dir, "all", plan.prompt_set, *how)
        sample = Sample(session, plan.params, plan.prompt_set, plan.data, plan.index)
        own = list(backbones.layer_channels(plan.model_dir, "auto"))
        with progress_bar(len(plan.missing) * plan.passes, "sweep", "pass") as bar:
            for timestep in plan.missing:
                layers = sample.represent(timestep, bar.update)
                candidates = score_layers(plan.evaluator, sample.positive, timestep, layers, own)
                found[timestep] = SweepResult(candidates, own, {layer: of.colours for layer, of in layers.items()})
                plan.cache.save(timestep, found[timestep])
    return found


def score_layers(
    evaluator: ProbeEvaluator, positive: np.ndarray, timestep: int, layers: dict[str, LayerFeatures], own: Sequence[str]
) -> list[Candidate]:
    """Score each layer alone, in the model's order, and fusions of layers, among them `own`, those of "auto"."""

    def candidate(names: list[str]) -> Candidate:
        values = np.concatenate([layers[name].values for name in names], axis=1)  # (n, D)
        prompted = np.concatenate([layers[name].prompted for name in names], axis=2)  # (m, P, D)
        dims = [layers[name].values.shape[1] for name in names]
        count = len(prompted)
        similar = margins.similarities(values[:count], prompted, positive).means(np.ones(count, bool)) if count else {}
        return Candidate(timestep, names, dims, evaluator.scores(values), similar)

    alone = [candidate([layer]) for layer in layers]
    accuracy = {single.layers[0]: single.scores.probe_accuracy for single in alone}
    found = alone + [candidate(names) for names in recommend.sets_to_fuse(accuracy, own)]
    for scored in found:
        log.info("%s", scored.in_words())
    return found
