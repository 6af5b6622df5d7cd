"""Sweeps timesteps and layers on a sample of training images, and recommends what to extract (the paper's Fig. 6).

analysis/sweep/sweep.csv         timestep, layers, dims, linear probe, purity, NMI, ARI, margins: a row a candidate
analysis/sweep/sweep.json        the same rows, the recommendation, and what they were made of
analysis/sweep/sweep.svg         every measure against the timestep
analysis/sweep/maps-<i>.png      image i of the training split: its maps' principal components as colours (Fig. 4)
analysis/sweep/recommended.yaml  a preset

Every image goes through the frozen model once a timestep, some of them once more for each of their prompts, and all
layers are read on the way (`sample.py`). Layers are judged alone and fused (`judge.py`, `margins.py`), and one set of
them is recommended (`recommend.py`). What came of a timestep is kept until the sweep is done (`kept.py`). Features of a
sweep are not: an extraction has its PCA basis from more images, and 16-bit numbers.
"""

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import atomic, devices, frozen_model, locks, provenance, seeding
from pipeline.config import Config
from pipeline.datasets import Images, PreparedDataset
from pipeline.diffusion import backbones, batching, prompts
from pipeline.diffusion.prompts import PromptSet
from pipeline.progress import progress_bar
from stages.analyze_features import figures, margins, recommend
from stages.analyze_features.judge import Judge, chance
from stages.analyze_features.kept import Kept, Swept
from stages.analyze_features.recommend import Candidate, Choice
from stages.analyze_features.sample import LayerFeatures, Sample

log = logging.getLogger(__name__)

PRESET = "recommended.yaml"


def run(config: Config) -> Path:
    """Sweeps as params.yaml says, continuing where a killed sweep stopped.

    Returns:
        analysis/sweep/recommended.yaml.

    Raises:
        PipelineError: the data set or the backbone is missing or changed, the sample is too small, or another process
            sweeps.
    """
    params = config.params.sweep_features
    dataset, backbone = PreparedDataset(config.dataset_dir), frozen_model.read_checked(config)
    target = config.root / "analysis" / "sweep"
    with locks.held(config.state_dir / "locks" / "sweep", str(target)):
        data = dataset.load("train")
        order = seeding.numpy_generator(config.params.analyze_features.seed, "swept images").permutation(len(data))
        index = order[: params.images]
        prompt_set = prompts.build(config.params.extract_features, dataset.class_names, config.root)
        made_of = _made_of(config, dataset, backbone, prompt_set, len(index))
        kept = Kept(config.state_dir / "sweep" / _key(config, made_of, backbone["files"]))
        swept = _sweep(config, prompt_set, data, index, kept)
        candidates = [candidate for found in swept.values() for candidate in found.candidates]
        choice = recommend.choose(candidates, params.tolerance)
        with atomic.folder_in_place_of(target) as folder:
            by_chance = chance(
                data.labels[index], prompts.per_image(prompt_set, config.params.extract_features.negatives)
            )
            _write_table(folder, candidates, choice, by_chance, made_of)
            _write_preset(folder, choice, made_of, config)
            _write_maps(folder, data, index[: params.picture_images], swept)
            for file in folder.iterdir():
                atomic.sync(file)
        kept.remove()
    for line in recommend.in_words(choice):
        log.info("%s", line)
    log.info("to take it: pipeline preset %s", target / PRESET)
    return target / PRESET


def _sweep(config: Config, prompt_set: PromptSet, data: Images, index: np.ndarray, kept: Kept) -> dict[int, Swept]:
    """What comes of each timestep, in ascending order; what is kept is not computed again."""
    timesteps = sorted(set(config.params.sweep_features.timesteps))
    found = {timestep: done for timestep in timesteps if (done := kept.load(timestep))}
    missing = [timestep for timestep in timesteps if timestep not in found]
    if found:
        log.info("resuming: %d of %d timesteps are done", len(found), len(timesteps))
    if missing:
        judge = Judge(data.labels[index], config.params.analyze_features)
        with batching.reproducible(devices.resolve(config.params.runtime.device), _dtype(config)):
            sample = Sample(config, prompt_set, data, index)
            own = list(backbones.layer_channels(config.backbone_dir, "auto"))
            own_prompts = f"{len(sample.positive)} of them under {sample.num_prompts} prompts each"
            log.info("%d passes a timestep: %d images, %s", sample.passes, len(index), own_prompts)
            with progress_bar(len(missing) * sample.passes, "sweep", "pass") as bar:
                for timestep in missing:
                    layers = sample.represent(timestep, bar.update)
                    candidates = judge_layers(judge, sample.positive, timestep, layers, own)
                    found[timestep] = Swept(candidates, {layer: of.colours for layer, of in layers.items()})
                    kept.save(timestep, found[timestep])
    return dict(sorted(found.items()))


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


def _write_table(
    folder: Path, candidates: list[Candidate], choice: Choice, by_chance: dict[str, float], made_of: dict[str, Any]
) -> None:
    """The table as CSV and JSON, and its curves."""
    rows = [candidate.row() for candidate in candidates]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {"layers": "+".join(row["layers"]), "dims": "+".join(map(str, row["dims"]))})
    atomic.write_text(folder / "sweep.csv", stream.getvalue())
    provenance.write_json(
        folder / "sweep.json", {"rows": rows, **choice.rows(), "chance": by_chance, "made_of": made_of}
    )
    atomic.write_text(folder / "sweep.svg", figures.curves(rows, choice.recommended.row(), by_chance))


def _write_preset(folder: Path, choice: Choice, made_of: dict[str, Any], config: Config) -> None:
    params = config.params.sweep_features
    described = f"{made_of['dataset']['name']} with {made_of['backbone']['name']}, {made_of['images']} images"
    preset = recommend.as_preset(choice, described, params.explained_variance, params.tolerance)
    atomic.write_text(folder / PRESET, preset)


def _write_maps(folder: Path, data: Images, pictured: np.ndarray, swept: dict[int, Swept]) -> None:
    """A picture of each of these images, int64 (p,): all layers by all timesteps."""
    for place, (image, pixels) in enumerate(zip(pictured, data.take(pictured).images, strict=True)):
        of_image = {
            timestep: {layer: colours[place] for layer, colours in found.colours.items()}
            for timestep, found in swept.items()
        }
        atomic.write_bytes(folder / f"maps-{image}.png", figures.maps(pixels, of_image))


def _made_of(
    config: Config, dataset: PreparedDataset, backbone: dict[str, Any], prompt_set: PromptSet, images: int
) -> dict[str, Any]:
    """What decides the numbers, for sweep.json."""
    params = config.params.extract_features
    keys = {"image_size", "denoise_prompt", "noise_seed", "dtype", "negatives"}
    return {
        "dataset": {"name": dataset.name, "hash": dataset.hash},
        "backbone": {key: backbone[key] for key in ("name", "source", "revision")},
        "images": images,
        "judged_by": config.params.analyze_features.model_dump(include={"validation_fraction", "splits", "seed"}),
        "extract_features": params.model_dump(include=keys),
        "image_conditioning": frozen_model.image_encoder_hashes(config),
        "prompts": prompt_set.texts,
        "prompts_per_image": prompts.per_image(prompt_set, params.negatives),
        "sweep_features": config.params.sweep_features.model_dump(),
        **provenance.describe(devices.resolve(config.params.runtime.device)),
    }


def _key(config: Config, made_of: dict[str, Any], model_files: dict[str, str]) -> str:
    """Names what decides a timestep's numbers to the last bit: neither the other timesteps nor the rule of choice."""
    runtime = config.params.runtime
    others = {"timesteps", "tolerance"}
    swept = {key: value for key, value in made_of["sweep_features"].items() if key not in others}
    deciding = made_of | {
        "sweep_features": swept,
        "model_files": model_files,
        "device": devices.resolve(runtime.device),
        "runtime": runtime.model_dump(include={"unet_batch_size", "compile"}),
    }
    return provenance.fingerprint(deciding)[:16]


def _dtype(config: Config) -> torch.dtype:
    return getattr(torch, config.params.extract_features.dtype)
