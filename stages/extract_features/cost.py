"""Estimate the cost of an extraction before it runs: images, passes, floating-point operations, bytes and time.

Torch's own counter counts the operations on models without weights (device "meta"), a multiplication and an addition
as two. Time is measured on a few batches with the real models.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline import estimates
from pipeline.diffusion import backbones, batching
from pipeline.diffusion.backbones import Conditioning
from pipeline.settings.config import Config
from pipeline.text import duration
from stages.extract_features import plan as planning
from stages.extract_features.extraction import Extraction
from stages.extract_features.run import load

_TIMED_BATCHES = 3


@dataclass(frozen=True)
class Estimate:
    """The cost of a complete set; FLOPs are per image (VAE) and per pass (denoiser)."""

    images: int
    passes_per_image: int
    shards: int
    vae_flops: int
    pass_flops: int
    num_bytes: int
    images_per_second: float
    device: str
    free_space: str
    process: list[str]

    def lines(self) -> list[str]:
        """Return the estimate as lines of text."""
        seconds = self.images / self.images_per_second
        flops = self.images * (self.vae_flops + self.passes_per_image * self.pass_flops)
        return [
            f"images        {self.images} in {self.shards} shards",
            f"passes        {self.passes_per_image} per image, {self.images * self.passes_per_image} in all",
            f"FLOPs         {self.vae_flops / 1e9:.3g} G per encoding, {self.pass_flops / 1e9:.3g} G per pass, "
            f"{flops / 1e12:.3g} T in all",
            f"disk          {self.num_bytes / 1e6:.1f} MB ({self.free_space})",
            *self.process,
            f"time          {duration(seconds)} on {self.device}, one process ({self.images_per_second:.3g} images/s, "
            f"after timing {_TIMED_BATCHES} batches)",
        ]


def estimate(config: Config) -> Estimate:
    """Plan the set that params.yaml describes, load the models and time a few batches.

    Raises:
        PipelineError: As `run`.
    """
    plan = planning.make(config)
    settings, content = plan.settings, plan.feature_set.content
    with batching.reproducible(plan.device, getattr(torch, settings.dtype)):
        extraction = load(plan)
        seconds = _seconds_per_image(extraction, content.prompts_per_image)
    process = estimates.of_process(plan.device)
    conditioning = extraction.session.model.conditioning
    vae_flops, pass_flops = count_flops(plan.model_dir, settings.layers, settings.image_size, conditioning)
    return Estimate(
        images=plan.feature_set.rows, passes_per_image=1 + content.prompts_per_image,
        shards=plan.feature_set.num_shards, vae_flops=vae_flops, pass_flops=pass_flops,
        num_bytes=content.row_bytes * plan.feature_set.rows, images_per_second=1 / seconds, device=plan.device,
        free_space=estimates.free_space(plan.target), process=process,
    )  # fmt: skip


def count_flops(path: Path, layers: list[str] | str, image_size: int, conditioning: Conditioning) -> tuple[int, int]:
    """Count the FLOPs of encoding one image, and of one pass with one prompt up to the last layer read."""
    of_prompts = (tensor.dtype for tensor in conditioning.tensors.values() if tensor.is_floating_point())
    twin = backbones.load(path, layers, "meta", next(of_prompts, torch.float32))  # accepts prompts of its own type only
    one_prompt = conditioning.select(torch.zeros(1, dtype=torch.int64)).to("meta")
    with FlopCounterMode(display=False) as encoding:
        latents = twin.encode_images(np.zeros((1, image_size, image_size, 3), np.uint8), image_size)
    with FlopCounterMode(display=False) as one_pass:
        twin.features(latents, 1, one_prompt)
    return encoding.get_total_flops(), one_pass.get_total_flops()


def _seconds_per_image(extraction: Extraction, prompts_per_image: int) -> float:
    """Time encoding and all passes of an image, after a warm-up."""
    session = extraction.session
    count = min(len(extraction.data), session.batcher.parallel_rows)
    index = np.arange(count)
    host = extraction.host_input(index)
    encoding = _timed(lambda: session.encode(host.images), session.backbone.device) / count
    inputs = extraction.inputs(host, session.encode(host.images))
    rows = torch.arange(session.batcher.parallel_rows) % count

    def passes() -> None:
        text = torch.zeros(len(rows), dtype=torch.int64)
        for _ in session.batcher.map(lambda chunk: extraction.maps(inputs, rows[chunk], text[chunk]), len(rows)):
            pass

    return encoding + (1 + prompts_per_image) * _timed(passes, session.backbone.device) / len(rows)


def _timed(action, device: str) -> float:
    """Return the mean seconds per call, after a first call to warm up."""
    action()
    _wait(device)
    started = time.perf_counter()
    for _ in range(_TIMED_BATCHES):
        action()
    _wait(device)
    return (time.perf_counter() - started) / _TIMED_BATCHES


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
