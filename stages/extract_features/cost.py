"""Estimate the cost of an extraction before it runs: images, passes, floating-point operations, bytes and time.

Torch's own counter counts the operations on models without weights (device "meta"), a multiplication and an addition
as two. Time is measured on a few batches with the real models, and that to start on the estimate itself.

Processes share only the file system: each computes whole shards, and all wait for the first, which fits the basis.
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
from pipeline.feature_store import Plan
from pipeline.settings.config import Config
from pipeline.text import duration, size
from stages.extract_features import plan as planning
from stages.extract_features import publish
from stages.extract_features.extraction import Extraction
from stages.extract_features.run import load

_TIMED_BATCHES = 3
_TIMED_SECONDS = 1.0
_COPIES_OF_FEATURES = 3  # of a shard: the one being computed, the last one, and its contiguous copy to be written
_COPIES_OF_IMAGES = 2  # of a shard: its own, and those of the next one
_BYTES_PER_SHARD = 8192  # besides its arrays: HDF5's own structures
_BYTES_OF_BASIS = 16384  # besides its arrays
_MORE_DESCRIPTORS = 5  # the locks of the set and of three shards, and the file that is being written


@dataclass(frozen=True)
class Estimate:
    """The cost of a complete set; FLOPs are per image (VAE) and per pass (denoiser)."""

    images: int
    passes_per_image: int
    basis_images: int  # that the basis is fitted on, 0 for a shared one; each takes two passes
    shards: int
    rows_per_shard: int
    vae_flops: int
    pass_flops: int
    num_bytes: int
    start_seconds: float  # of a process, until the first pass
    seconds_per_encoding: float
    seconds_per_pass: float
    device: str
    free_space: str
    process: list[str]
    processes: int
    in_place: str = ""  # what exists already, in words
    shards_done: int = 0

    @property
    def missing(self) -> int:
        """The number of shards that a run computes."""
        return self.shards - self.shards_done

    @property
    def images_left(self) -> int:
        """The images of those shards, at most: the last shard of a set may have fewer than the others."""
        return min(self.images, self.missing * self.rows_per_shard)

    @property
    def images_per_second(self) -> float:
        """The rate of one process."""
        return 1 / (self.seconds_per_encoding + self.passes_per_image * self.seconds_per_pass)

    @property
    def basis_seconds(self) -> float:
        """The time of fitting the basis, which one process does before the first shard."""
        return 0 if self.shards_done else self.basis_images * (self.seconds_per_encoding + 2 * self.seconds_per_pass)

    @property
    def seconds(self) -> float:
        """The time from the first to the last process's end: a process has at most ceil(missing / processes) shards."""
        most = min(self.images_left, -(-self.missing // self.processes) * self.rows_per_shard)
        return self.start_seconds + self.basis_seconds + most / self.images_per_second

    def lines(self) -> list[str]:
        """Return the estimate as lines of text."""
        images, basis = self.images_left, 0 if self.shards_done else self.basis_images
        flops = images * (self.vae_flops + self.passes_per_image * self.pass_flops)
        flops += basis * (self.vae_flops + 2 * self.pass_flops)
        several = self.processes > 1
        who = f"{self.processes} processes, each with a GPU or a machine of its own" if several else "one process"
        who += f", of which {self.missing} have work (one shard each)" if self.processes > self.missing else ""
        rest = f" for the {self.missing} missing shards" if self.shards_done else ""
        in_all = rest or " in all"
        return [
            f"images        {self.images} in {self.shards} shards",
            f"passes        {self.passes_per_image} per image, {images * self.passes_per_image}{in_all}"
            f"{f', and {2 * basis} for the basis' if basis else ''}",
            f"FLOPs         {self.vae_flops / 1e9:.3g} G per encoding, {self.pass_flops / 1e9:.3g} G per pass, "
            f"{flops / 1e12:.3g} T{in_all}",
            f"disk          {size(self.num_bytes)} ({self.free_space})",
            *self.process,
            *([f"in place      {self.in_place}"] if self.in_place else []),
            f"time          {duration(self.seconds)}{rest} on {self.device}, {who} "
            f"({duration(self.start_seconds)} to start, {duration(self.basis_seconds)} for the basis, "
            f"then {self.images_per_second:.3g} images/s"
            f"{' each' if several else ''}; after timing a few batches)",
        ]


def estimate(config: Config, processes: int = 1, started: float | None = None, overwrite: bool = False) -> Estimate:
    """Plan the set that params.yaml describes, load the models and time a few batches.

    Args:
        config: The project's configuration.
        processes: How many processes will share the shards, each as fast as this one.
        started: When this process started, by `time.perf_counter`, if the time to start includes its imports.
        overwrite: Whether the run may replace a finished set of other features.

    Raises:
        PipelineError: As `run`.
    """
    started = time.perf_counter() if started is None else started
    plan = planning.make(config)
    settings, content = plan.settings, plan.feature_set.content
    with batching.reproducible(plan.device, getattr(torch, settings.dtype)):
        extraction = load(plan)
        start_seconds = time.perf_counter() - started
        seconds_per_encoding, seconds_per_pass = _timings(extraction)
    in_place, shards_done = publish.in_place(plan.target, plan.staging, plan.feature_set, overwrite)
    rows = len(plan.feature_set.shard_rows(0))
    features, images = rows * content.read_row_bytes, rows * 3 * plan.dataset.image_size**2
    more_bytes = _COPIES_OF_FEATURES * features + _COPIES_OF_IMAGES * images
    process = estimates.of_process(plan.device, more_bytes, features, _MORE_DESCRIPTORS)
    num_bytes = _bytes_on_disk(plan.feature_set, extraction.session.backbone.channels)
    conditioning = extraction.session.model.conditioning
    vae_flops, pass_flops = count_flops(plan.model_dir, settings.layers, settings.image_size, conditioning)
    return Estimate(
        images=plan.feature_set.rows, passes_per_image=1 + content.prompts_per_image,
        basis_images=0 if plan.shared_basis else min(settings.basis_images, plan.feature_set.rows),
        shards=plan.feature_set.num_shards, rows_per_shard=plan.feature_set.rows_per_shard,
        vae_flops=vae_flops, pass_flops=pass_flops, num_bytes=num_bytes,
        start_seconds=start_seconds, seconds_per_encoding=seconds_per_encoding, seconds_per_pass=seconds_per_pass,
        device=plan.device, free_space=estimates.free_space(plan.target), process=process, processes=processes,
        in_place=in_place, shards_done=shards_done,
    )  # fmt: skip


def _bytes_on_disk(plan: Plan, channels: dict[str, int]) -> int:
    """Return the bytes of the shards and of the basis, which matter for small sets; without the manifest and figure."""
    numbers = 0  # float64: per layer the mean of the channels, and per component its vector and explained variance
    for layer, (start, stop) in plan.content.layers.items():
        numbers += channels[layer] + (stop - start) * (channels[layer] + 1)
    return plan.content.row_bytes * plan.rows + plan.num_shards * _BYTES_PER_SHARD + _BYTES_OF_BASIS + 8 * numbers


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


def _timings(extraction: Extraction) -> tuple[float, float]:
    """Return the seconds of encoding an image, and of a pass, after a warm-up."""
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

    return encoding, _timed(passes, session.backbone.device) / len(rows)


def _timed(action, device: str) -> float:
    """Return the mean seconds per call, of a few calls in some seconds, after a first call to warm up."""
    action()
    _wait(device)
    started, calls, seconds = time.perf_counter(), 0, 0.0
    while calls < _TIMED_BATCHES or seconds < _TIMED_SECONDS:
        action()
        _wait(device)
        calls, seconds = calls + 1, time.perf_counter() - started
    return seconds / calls


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
