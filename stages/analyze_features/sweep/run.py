"""Sweeps timesteps and layers on a sample of training images, and recommends what to extract (the paper's Fig. 6).

analysis/sweep/sweep.csv         timestep, layers, dims, linear probe, purity, NMI, ARI, margins: a row a candidate
analysis/sweep/sweep.json        the same rows, the recommendation, and what they were made of
analysis/sweep/sweep.svg         every measure against the timestep
analysis/sweep/maps-<i>.png      image i of the training split: its maps' principal components as colours (Fig. 4)
analysis/sweep/recommended.yaml  a preset
.pipeline/sweep/<key>            what came of each timestep, for the next sweep; `make clean` removes it

plan.py       what there is to do
sample.py     every image through the model once a timestep, some once more for each of their prompts: all layers
judge.py      and margins.py: layers judged alone and fused
recommend.py  one set of them is chosen; advice.py says so
kept.py       what came of a timestep, kept
publish.py   what is written; sweep_figures.py draws

The features of a sweep are not kept: an extraction has its PCA basis from more images, and 16-bit numbers.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline import devices
from pipeline.diffusion import backbones, batching, frozen_model
from pipeline.io import locks
from pipeline.progress import progress_bar
from pipeline.settings.config import Config
from stages.analyze_features import margins
from stages.analyze_features.probes import Judge
from stages.analyze_features.sweep import advice, publish, recommend
from stages.analyze_features.sweep import plan as planning
from stages.analyze_features.sweep.cache import Swept
from stages.analyze_features.sweep.plan import Plan
from stages.analyze_features.sweep.recommend import Candidate
from stages.analyze_features.sweep.sample import LayerFeatures, Sample

log = logging.getLogger(__name__)


def run(config: Config) -> Path:
    """Sweeps as params.yaml says, taking the timesteps that an earlier sweep has done; without a model if all are.

    Returns:
        analysis/sweep/recommended.yaml.

    Raises:
        PipelineError: the data set or the backbone is missing or changed, the sample is too small, or another process
            sweeps.
    """
    target = config.root / "analysis" / "sweep"
    with locks.held(config.state_dir / "locks" / "sweep", str(target)):
        plan = planning.make(config)
        for line in plan.lines():
            log.info("%s", line)
        if plan.missing:
            frozen_model.read_checked(config)
            swept = dict(sorted((plan.done | _sweep(config, plan)).items()))
        else:
            swept = plan.done
        candidates = [candidate for found in swept.values() for candidate in found.candidates]
        choice = recommend.choose(candidates, config.params.sweep_features.standard_errors)
        publish.write(target, plan, swept, choice)
        plan.kept.remove_others()
    for line in [*advice.in_words(choice), *advice.hint(choice, len(plan.data) - len(plan.index))]:
        log.info("%s", line)
    log.info("to take it: pipeline preset %s", target / publish.PRESET)
    return target / publish.PRESET


def _sweep(config: Config, plan: Plan) -> dict[int, Swept]:
    """What comes of each missing timestep; it is kept."""
    dtype, found = getattr(torch, config.params.extract_features.dtype), {}
    with batching.reproducible(devices.resolve(config.params.runtime.device), dtype):
        sample = Sample(config, plan.prompt_set, plan.data, plan.index)
        own = list(backbones.layer_channels(config.backbone_dir, "auto"))
        with progress_bar(len(plan.missing) * plan.passes, "sweep", "pass") as bar:
            for timestep in plan.missing:
                layers = sample.represent(timestep, bar.update)
                candidates = judge_layers(plan.judge, sample.positive, timestep, layers, own)
                found[timestep] = Swept(candidates, own, {layer: of.colours for layer, of in layers.items()})
                plan.kept.save(timestep, found[timestep])
    return found


def judge_layers(
    judge: Judge, positive: np.ndarray, timestep: int, layers: dict[str, LayerFeatures], own: Sequence[str]
) -> list[Candidate]:
    """Each layer alone, and fusions of them.

    Args:
        judge: of the sample's images.
        positive: int64 (m,), which prompt matches each of the first m images.
        timestep: of the layers.
        layers: by name, in the model's order.
        own: the layers that "auto" stands for.
    """

    def candidate(names: list[str]) -> Candidate:
        values = np.concatenate([layers[name].values for name in names], axis=1)  # (n, D)
        prompted = np.concatenate([layers[name].prompted for name in names], axis=2)  # (m, P, D)
        dims = [layers[name].values.shape[1] for name in names]
        return Candidate(timestep, names, dims, judge.scores(values), _margins(values, prompted, positive))

    alone = [candidate([layer]) for layer in layers]
    accuracy = {single.layers[0]: single.scores.probe_accuracy for single in alone}
    found = alone + [candidate(names) for names in recommend.sets_to_fuse(accuracy, own)]
    for judged in found:
        log.info("%s", judged.in_words())
    return found


def _margins(values: np.ndarray, prompted: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """Of the first m images; empty if there are none."""
    count = len(prompted)
    return margins.similarities(values[:count], prompted, positive).means(np.ones(count, bool)) if count else {}
