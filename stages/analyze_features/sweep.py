"""Sweeps timesteps and layers on a sample of training images, and recommends what to extract (the paper's Fig. 6).

analysis/sweep/sweep.csv         timestep, layers, dims, linear probe, purity, NMI, ARI: a row a candidate
analysis/sweep/sweep.json        the same rows, the recommendation, and what they were made of
analysis/sweep/sweep.svg         every measure against the timestep
analysis/sweep/maps-<i>.png      image i of the training split: its maps' principal components as colours (Fig. 4)
analysis/sweep/recommended.yaml  a preset

Every image goes through the frozen model once a timestep, and all layers are read on the way (`sample.py`). Layers
are judged alone and fused (`judge.py`, `recommend.py`). Features of a sweep are not kept: an extraction has its PCA
basis from more images, and 16-bit numbers.
"""

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import atomic, devices, frozen_model, provenance, seeding
from pipeline.config import Config
from pipeline.datasets import PreparedDataset
from pipeline.diffusion import backbones, batching
from pipeline.progress import progress_bar
from stages.analyze_features import figures, recommend
from stages.analyze_features.judge import Judge
from stages.analyze_features.recommend import Candidate
from stages.analyze_features.sample import LayerFeatures, Sample

log = logging.getLogger(__name__)

PRESET = "recommended.yaml"


def run(config: Config) -> Path:
    """Sweeps as params.yaml says.

    Returns:
        analysis/sweep/recommended.yaml.

    Raises:
        PipelineError: the data set or the backbone is missing or changed, or the sample is too small.
    """
    params = config.params.sweep_features
    dataset, backbone = PreparedDataset(config.dataset_dir), frozen_model.read_checked(config)
    data = dataset.load("train")
    order = seeding.numpy_generator(config.params.analyze_features.seed, "swept images").permutation(len(data))
    index = order[: params.images]
    judge = Judge(data.labels[index], config.params.analyze_features)
    with batching.reproducible(devices.resolve(config.params.runtime.device), _dtype(config)):
        sample = Sample(config, data, index)
        candidates, rgb = _sweep(config, sample, judge)
    chosen = recommend.recommend(candidates, params.tolerance)
    described = f"{dataset.name} with {backbone['name']}, {len(index)} images"
    target = config.root / "analysis" / "sweep"
    with atomic.folder_in_place_of(target) as folder:
        _write_table(folder, candidates, chosen, _made_of(config, dataset, backbone, len(index)))
        preset = recommend.as_preset(chosen, described, params.explained_variance, params.tolerance)
        atomic.write_text(folder / PRESET, preset)
        for place, image in enumerate(sample.images[: params.picture_images]):
            pictured = {
                timestep: {layer: maps[place] for layer, maps in found.items()} for timestep, found in rgb.items()
            }
            atomic.write_bytes(folder / f"maps-{index[place]}.png", figures.maps(image, pictured))
        for file in folder.iterdir():
            atomic.sync(file)
    fused = " + ".join(chosen.layers)
    log.info("recommended: t = %d, %s; to take it: pipeline preset %s", chosen.timestep, fused, target / PRESET)
    return target / PRESET


def _sweep(config: Config, sample: Sample, judge: Judge) -> tuple[list[Candidate], dict[int, dict[str, np.ndarray]]]:
    """All candidates, and timestep -> layer -> the pictured images' colours."""
    own = list(backbones.layer_channels(config.backbone_dir, "auto"))
    timesteps = sorted(set(config.params.sweep_features.timesteps))
    candidates: list[Candidate] = []
    rgb = {}
    with progress_bar(len(timesteps) * len(sample.images), "sweep", "image") as bar:
        for timestep in timesteps:
            layers = sample.represent(timestep, bar.update)
            candidates += judge_layers(judge, timestep, layers, own)
            rgb[timestep] = {layer: found.rgb for layer, found in layers.items()}
    return candidates, rgb


def judge_layers(judge: Judge, timestep: int, layers: dict[str, LayerFeatures], own: Sequence[str]) -> list[Candidate]:
    """Each layer alone, and fusions of them."""

    def candidate(names: list[str]) -> Candidate:
        values = [layers[name].values for name in names]
        scores = judge.scores(np.concatenate(values, axis=1))
        return Candidate(timestep, names, [part.shape[1] for part in values], scores)

    alone = [candidate([layer]) for layer in layers]
    accuracy = {single.layers[0]: single.scores.probe_accuracy for single in alone}
    found = alone + [candidate(names) for names in recommend.sets_to_fuse(accuracy, own)]
    for judged in found:
        accuracy_percent = 100 * judged.scores.probe_accuracy
        log.info("t = %d, %s: linear probe %.2f %%", timestep, " + ".join(judged.layers), accuracy_percent)
    return found


def _write_table(folder: Path, candidates: list[Candidate], chosen: Candidate, made_of: dict[str, Any]) -> None:
    """The table as CSV and JSON, and its curves."""
    rows = [candidate.row() for candidate in candidates]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {"layers": "+".join(row["layers"]), "dims": "+".join(map(str, row["dims"]))})
    atomic.write_text(folder / "sweep.csv", stream.getvalue())
    summary = {"rows": rows, "recommended": chosen.row(), "made_of": made_of}
    provenance.write_json(folder / "sweep.json", summary)
    atomic.write_text(folder / "sweep.svg", figures.curves(rows, chosen.row()))


def _made_of(config: Config, dataset: PreparedDataset, backbone: dict[str, Any], images: int) -> dict[str, Any]:
    """What decides the numbers, for sweep.json."""
    keys = {"image_size", "denoise_prompt", "noise_seed", "dtype"}
    return {
        "dataset": {"name": dataset.name, "hash": dataset.hash},
        "backbone": {key: backbone[key] for key in ("name", "source", "revision")},
        "images": images,
        "judged_by": config.params.analyze_features.model_dump(include={"validation_fraction", "splits", "seed"}),
        "extract_features": config.params.extract_features.model_dump(include=keys),
        "sweep_features": config.params.sweep_features.model_dump(),
        **provenance.describe(devices.resolve(config.params.runtime.device)),
    }


def _dtype(config: Config) -> torch.dtype:
    return getattr(torch, config.params.extract_features.dtype)
