"""Plan a sweep and its cost before the frozen model is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import devices, provenance, seeding
from pipeline.data.datasets import Images, PreparedDataset
from pipeline.diffusion import backbones, frozen_model, prompts
from pipeline.diffusion.prompts import PromptSet
from pipeline.settings.config import Config
from pipeline.settings.params import ExtractFeatures, Runtime, SweepFeatures
from stages.analyze_features.probes import ProbeEvaluator
from stages.analyze_features.sweep.cache import SweepCache, SweepResult

_MEASURED_WITH = {"image_size", "denoise_prompt", "noise_seed", "dtype", "negatives"}  # keys of extract_features


@dataclass(frozen=True)
class SweepPlan:
    """A sweep to be computed, resolved to paths and sections."""

    params: SweepFeatures
    settings: ExtractFeatures
    runtime: Runtime
    model_dir: Path
    backbone_manifest: Path
    image_encoder: Path | None  # its folder; None without image conditioning
    device: str
    data: Images  # the training split
    index: np.ndarray  # int64 (n,), the images of the sample; the first m also run with their own prompts
    margin_images: int  # m
    prompt_set: PromptSet
    prompts_per_image: int  # P
    evaluator: ProbeEvaluator  # of the sample
    made_of: dict[str, Any]  # everything that determines the numbers, for sweep.json
    cache: SweepCache
    done: dict[int, SweepResult]  # of the finished timesteps
    missing: list[int]  # the other timesteps, ascending

    @property
    def passes(self) -> int:
        """Passes of the model per timestep."""
        return len(self.index) + self.margin_images * self.prompts_per_image

    def lines(self) -> list[str]:
        """Return the plan as lines of text."""
        prompted = f"{self.margin_images:,} of them also under {self.prompts_per_image} prompts each"
        timesteps = len(self.done) + len(self.missing)
        return [
            f"images        {len(self.index):,} of {len(self.data):,}, {prompted}",
            f"timesteps     {timesteps}, {len(self.done)} of them done",
            f"passes        {self.passes:,} per timestep, {len(self.missing) * self.passes:,} to go",
        ]


def make(config: Config) -> SweepPlan:
    """Plan the sweep that params.yaml describes; nothing is written. Raise PipelineError as `run` does."""
    params, extraction = config.params.sweep_features, config.params.extract_features
    dataset, backbone = PreparedDataset(config.dataset_dir), frozen_model.read_manifest(config.backbone_manifest)
    data = dataset.load("train")
    order = seeding.numpy_generator(config.params.analyze_features.seed, "swept images").permutation(len(data))
    index = order[: params.images]
    margin_images = min(params.margin_images, len(index))
    device = devices.resolve(config.params.runtime.device)
    encoder = config.path(extraction.image_conditioning) if extraction.image_conditioning else None
    prompt_set = prompts.build(extraction, dataset.class_names, config.path)
    evaluator = ProbeEvaluator(data.labels[index], config.params.analyze_features)
    made_of = {
        "dataset": {"name": dataset.name, "hash": dataset.hash},
        "backbone": backbone.origin(),
        "images": {"sampled": len(index), "held_out": evaluator.held_out, "prompted": margin_images},
        "scored_with": config.params.analyze_features.model_dump(include={"validation_fraction", "splits", "seed"}),
        "extract_features": extraction.model_dump(include=_MEASURED_WITH),
        "image_conditioning": frozen_model.image_encoder_hashes(encoder),
        "prompts": prompt_set.texts,
        "matching": prompt_set.positive,
        "prompts_per_image": prompts.per_image(prompt_set, extraction.negatives),
        "sweep_features": params.model_dump(),
        **provenance.describe(device),
    }
    cache = SweepCache(config.state_dir / "sweep" / _key(config.params.runtime, device, made_of, backbone.files))
    timesteps = sorted(set(params.timesteps))
    done = {timestep: result for timestep in timesteps if (result := cache.load(timestep))}
    if len(done) < len(timesteps) and config.backbone_dir.exists():  # a finished sweep needs no model
        backbones.check_timesteps(config.backbone_dir, timesteps, "sweep_features.timesteps")
        backbones.check_image_size(config.backbone_dir, extraction.image_size)
    return SweepPlan(
        params=params, settings=extraction, runtime=config.params.runtime, model_dir=config.backbone_dir,
        backbone_manifest=config.backbone_manifest, image_encoder=encoder, device=device, data=data, index=index,
        margin_images=margin_images, prompt_set=prompt_set, prompts_per_image=made_of["prompts_per_image"],
        evaluator=evaluator, made_of=made_of, cache=cache, done=done,
        missing=[timestep for timestep in timesteps if timestep not in done],
    )  # fmt: skip


def _key(runtime: Runtime, device: str, made_of: dict[str, Any], model_files: dict[str, str]) -> str:
    """Hash everything that determines a timestep's numbers to the last bit: not the other timesteps, nor the rule.

    The code counts instead of the commit, because an edited params.yaml makes the commit "-dirty".
    """
    others = {"timesteps", "standard_errors"}
    swept = {key: value for key, value in made_of["sweep_features"].items() if key not in others}
    determining = {key: value for key, value in made_of.items() if key != "commit"} | {
        "sweep_features": swept,
        "code": provenance.code_sha256(),
        "model_files": model_files,
        "device": device,
        "runtime": runtime.model_dump(include={"unet_batch_size", "compile"}),
    }
    return provenance.fingerprint(determining)[:16]
