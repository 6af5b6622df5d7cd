"""What a sweep is of, and what it costs: known before the frozen model is loaded."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import devices, provenance, seeding
from pipeline.data.datasets import Images, PreparedDataset
from pipeline.diffusion import backbones, frozen_model, prompts
from pipeline.diffusion.prompts import PromptSet
from pipeline.settings.config import Config
from stages.analyze_features.probes import Judge
from stages.analyze_features.sweep.cache import Kept, Swept


@dataclass(frozen=True)
class Plan:
    """A sweep that is to be made.

    Attributes:
        data: the training split.
        index: int64 (n,), the images of the sample; the first `margin_images` are also seen under their own prompts.
        margin_images: m.
        prompt_set: the prompts, `prompts_per_image` of which an image is seen under.
        prompts_per_image: P.
        judge: of the sample.
        made_of: what decides the numbers, for sweep.json.
        kept: where timesteps that are done are kept.
        done: what came of each of them.
        missing: the timesteps that are not done, ascending.
    """

    data: Images
    index: np.ndarray
    margin_images: int
    prompt_set: PromptSet
    prompts_per_image: int
    judge: Judge
    made_of: dict[str, Any]
    kept: Kept
    done: dict[int, Swept]
    missing: list[int]

    @property
    def passes(self) -> int:
        """Of the model, for each timestep."""
        return len(self.index) + self.margin_images * self.prompts_per_image

    def lines(self) -> list[str]:
        """The plan, for people."""
        prompted = f"{self.margin_images:,} of them also under {self.prompts_per_image} prompts each"
        timesteps = len(self.done) + len(self.missing)
        return [
            f"images        {len(self.index):,} of {len(self.data):,}, {prompted}",
            f"timesteps     {timesteps}, {len(self.done)} of them done",
            f"passes        {self.passes:,} a timestep, {len(self.missing) * self.passes:,} to go",
        ]


def make(config: Config) -> Plan:
    """The sweep that params.yaml describes; nothing is written.

    Raises:
        PipelineError: the data set or the backbone's manifest is missing or damaged, or the sample is too small.
    """
    params, extraction = config.params.sweep_features, config.params.extract_features
    dataset, backbone = PreparedDataset(config.dataset_dir), frozen_model.read_manifest(config)
    data = dataset.load("train")
    order = seeding.numpy_generator(config.params.analyze_features.seed, "swept images").permutation(len(data))
    index = order[: params.images]
    margin_images = min(params.margin_images, len(index))
    prompt_set = prompts.build(extraction, dataset.class_names, config.path)
    judge = Judge(data.labels[index], config.params.analyze_features)
    made_of = {
        "dataset": {"name": dataset.name, "hash": dataset.hash},
        "backbone": {key: backbone[key] for key in ("name", "source", "revision")},
        "images": {"sampled": len(index), "held_out": judge.held_out, "prompted": margin_images},
        "judged_by": config.params.analyze_features.model_dump(include={"validation_fraction", "splits", "seed"}),
        "extract_features": extraction.model_dump(
            include={"image_size", "denoise_prompt", "noise_seed", "dtype", "negatives"}
        ),
        "image_conditioning": frozen_model.image_encoder_hashes(config),
        "prompts": prompt_set.texts,
        "matching": prompt_set.positive,
        "prompts_per_image": prompts.per_image(prompt_set, extraction.negatives),
        "sweep_features": params.model_dump(),
        **provenance.describe(devices.resolve(config.params.runtime.device)),
    }
    kept = Kept(config.state_dir / "sweep" / _key(config, made_of, backbone["files"]))
    timesteps = sorted(set(params.timesteps))
    done = {timestep: swept for timestep in timesteps if (swept := kept.load(timestep))}
    if len(done) < len(timesteps) and config.backbone_dir.exists():  # a finished sweep needs no model
        backbones.check_timesteps(config.backbone_dir, timesteps, "sweep_features.timesteps")
        backbones.check_image_size(config.backbone_dir, extraction.image_size)
    return Plan(
        data=data,
        index=index,
        margin_images=margin_images,
        prompt_set=prompt_set,
        prompts_per_image=made_of["prompts_per_image"],
        judge=judge,
        made_of=made_of,
        kept=kept,
        done=done,
        missing=[timestep for timestep in timesteps if timestep not in done],
    )


def _key(config: Config, made_of: dict[str, Any], model_files: dict[str, str]) -> str:
    """Names what decides a timestep's numbers to the last bit: neither the other timesteps nor the rule of choice.

    The code is in it, the commit is not: an edited params.yaml makes that "-dirty".
    """
    runtime = config.params.runtime
    others = {"timesteps", "standard_errors"}
    swept = {key: value for key, value in made_of["sweep_features"].items() if key not in others}
    deciding = {key: value for key, value in made_of.items() if key != "commit"} | {
        "sweep_features": swept,
        "code": provenance.code_sha256(),
        "model_files": model_files,
        "device": devices.resolve(runtime.device),
        "runtime": runtime.model_dump(include={"unet_batch_size", "compile"}),
    }
    return provenance.fingerprint(deciding)[:16]
