"""What an extraction will cost, before it is run: images, passes, floating-point operations, bytes and time.

Operations are counted by torch's own counter on models without weights (device "meta"), multiplications and additions
apart; time is measured on a few batches with the real ones.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.diffusion import backbones, batching
from pipeline.diffusion.backbones import Conditioning
from pipeline.settings.config import Config
from stages.extract_features import plan as planning
from stages.extract_features.extraction import Extraction
from stages.extract_features.run import load

_TIMED_BATCHES = 3


@dataclass(frozen=True)
class Estimate:
    """The cost of a whole set; FLOPs are per image (VAE) and per pass (denoiser)."""

    images: int
    passes_per_image: int
    shards: int
    vae_flops: int
    pass_flops: int
    num_bytes: int
    images_per_second: float
    device: str

    @property
    def flops_per_image(self) -> int:
        """One encoding and all passes."""
        return self.vae_flops + self.passes_per_image * self.pass_flops

    def lines(self) -> list[str]:
        """The estimate, for people."""
        seconds = self.images / self.images_per_second
        return [
            f"images        {self.images} in {self.shards} shards",
            f"passes        {self.passes_per_image} per image, {self.images * self.passes_per_image} in all",
            f"FLOPs         {self.vae_flops / 1e9:.3g} G per encoding, {self.pass_flops / 1e9:.3g} G per pass, "
            f"{self.flops_per_image * self.images / 1e12:.3g} T in all",
            f"disk          {self.num_bytes / 1e6:.1f} MB",
            f"time          {_duration(seconds)} on {self.device}, one process ({self.images_per_second:.3g} images/s, "
            f"after timing {_TIMED_BATCHES} batches)",
        ]


def estimate(config: Config) -> Estimate:
    """Plans the set that params.yaml describes, loads the models and times a few batches.

    Raises:
        PipelineError: as `run`.
    """
    job = planning.make(config)
    params, content = config.params.extract_features, job.plan.content
    with batching.reproducible(job.device, getattr(torch, params.dtype)):
        extraction = load(job)
        seconds = _seconds_per_image(extraction, content.prompts_per_image)
    vae_flops, pass_flops = count_flops(config.backbone_dir, params.layers, params.image_size, extraction.conditioning)
    return Estimate(
        images=job.plan.rows,
        passes_per_image=1 + content.prompts_per_image,
        shards=job.plan.num_shards,
        vae_flops=vae_flops,
        pass_flops=pass_flops,
        num_bytes=content.row_bytes * job.plan.rows,
        images_per_second=1 / seconds,
        device=job.device,
    )


def count_flops(path: Path, layers: list[str] | str, image_size: int, conditioning: Conditioning) -> tuple[int, int]:
    """Operations of encoding one image, and of one pass with one prompt, nothing past the last layer included."""
    of_prompts = (tensor.dtype for tensor in conditioning.tensors.values() if tensor.is_floating_point())
    twin = backbones.load(path, layers, "meta", next(of_prompts, torch.float32))  # takes prompts of its own type only
    one_prompt = conditioning.take(torch.zeros(1, dtype=torch.int64)).to("meta")
    with FlopCounterMode(display=False) as encoding:
        latents = twin.encode_images(np.zeros((1, image_size, image_size, 3), np.uint8), image_size)
    with FlopCounterMode(display=False) as one_pass:
        twin.features(latents, 1, one_prompt)
    return encoding.get_total_flops(), one_pass.get_total_flops()


def _seconds_per_image(extraction: Extraction, prompts_per_image: int) -> float:
    """Of encoding, and of as many passes as an image needs; the first batches, which warm up, are not counted."""
    count = min(len(extraction.data), extraction.batcher.parallel_rows)
    index = np.arange(count)
    host = extraction.host_input(index)
    encoding = _timed(lambda: extraction.encode(host.images), extraction.backbone.device) / count
    inputs = extraction.inputs(host, extraction.encode(host.images))
    rows = torch.arange(extraction.batcher.parallel_rows) % count

    def passes() -> None:
        text = torch.zeros(len(rows), dtype=torch.int64)
        for _ in extraction.batcher.map(lambda chunk: extraction.maps(inputs, rows[chunk], text[chunk]), len(rows)):
            pass

    return encoding + (1 + prompts_per_image) * _timed(passes, extraction.backbone.device) / len(rows)


def _timed(action, device: str) -> float:
    """Seconds of one call, the mean of a few after the first."""
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


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
