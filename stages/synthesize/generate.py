"""Generate images from text with the frozen model, the same weights that guide FedDifRC (Rombach et al., CVPR 2022).

It uses classifier-free guidance (Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598) and deterministic DDIM steps
(Song et al., ICLR 2021, https://arxiv.org/abs/2010.02502, eta = 0). The initial noise of image k of class c comes from
a CPU generator keyed by (seed, c, k), so an image depends neither on the number of images nor, up to rounding, on its
batch.
"""

import logging
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from pipeline import seeding
from pipeline.errors import PipelineError
from pipeline.settings.params import Synthesize

log = logging.getLogger(__name__)


class Generator:
    """A text-to-image model, loaded once for all classes."""

    def __init__(self, path: Path, params: Synthesize, image_size: int, batch_size: int, device: str) -> None:
        """Load a diffusers folder with safetensors weights; images are resized to `image_size`, bicubically.

        Raise PipelineError if it cannot be loaded, or its noise schedule is too short for the steps.
        """
        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.set_verbosity_error()  # such as diffusers' on float16 on a CPU, which works here
            library.disable_progress_bar()
        try:
            unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            dtype = getattr(torch, params.dtype)
            self._pipe = StableDiffusionPipeline.from_pretrained(path, dtype=dtype, use_safetensors=True, **unchecked)
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            problem = f"{path} cannot be loaded as a Stable Diffusion pipeline ({reason})"
            raise PipelineError(f"{problem}. Set prepare_backbone to a Stable Diffusion model.") from None
        self._pipe.scheduler = DDIMScheduler.from_config(self._pipe.scheduler.config)
        self._check_steps(path.name, params.num_inference_steps)
        self._pipe.set_progress_bar_config(disable=True)
        self._pipe.to(device)
        self._params, self._image_size, self._batch_size = params, image_size, batch_size

    def __call__(self, label: int, class_name: str, count: int) -> np.ndarray:
        """Generate images 0 to count - 1 of a class: uint8 (count, image_size, image_size, 3)."""
        parts: list[np.ndarray] = []
        start = 0
        while start < count:
            numbers = range(start, min(start + self._batch_size, count))
            if (images := self._fitting(label, class_name, numbers)) is not None:
                parts.append(images)
                start = numbers.stop
        return np.concatenate(parts)

    def _fitting(self, label: int, class_name: str, numbers: range) -> np.ndarray | None:
        """Generate images; None if they do not fit into memory together, after halving the batches to come."""
        try:
            return self._batch(label, class_name, numbers)
        except torch.OutOfMemoryError:
            if len(numbers) == 1:
                raise PipelineError(
                    "Not even one image at a time fits into memory. Use a device with more memory, or set "
                    "synthesize.dtype to float16."
                ) from None
        self._batch_size = len(numbers) // 2  # outside the handler, which would hold the batch's tensors
        torch.cuda.empty_cache()
        log.warning("Out of memory with batches of %d images; continuing with %d.", len(numbers), self._batch_size)
        return None

    def _check_steps(self, name: str, steps: int) -> None:
        schedule = self._pipe.scheduler
        total = schedule.config.num_train_timesteps
        if steps <= total:
            schedule.set_timesteps(steps)
        if steps > total or schedule.timesteps.max() >= total:  # an offset of steps may lead past the end
            raise PipelineError(
                f"synthesize.num_inference_steps = {steps}: the noise schedule of {name} has {total} timesteps. Set "
                f"it to at most {total // 2}."
            )

    @torch.inference_mode()
    def _batch(self, label: int, class_name: str, numbers: range) -> np.ndarray:
        unet = self._pipe.unet
        shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        generators = [seeding.torch_generator(self._params.seed, "synthesize", label, number) for number in numbers]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        prompt = self._params.prompt_template.replace("{class_name}", class_name)
        latents = self._pipe(
            [prompt] * len(numbers),
            num_inference_steps=self._params.num_inference_steps,
            guidance_scale=self._params.guidance_scale,
            latents=noise.to(self._pipe.device, unet.dtype),
            output_type="latent",
        ).images  # (B, C, h, w)
        decoded = self._pipe.vae.decode(latents / self._pipe.vae.config.scaling_factor).sample  # (B, 3, H, W), -1 to 1
        self._check_finite(decoded, class_name)
        images = self._pipe.image_processor.postprocess(decoded, output_type="np")  # float32 (B, H, W, 3), 0 to 1
        pixels = (255 * images).round().astype(np.uint8)
        return np.stack([self._resize(image) for image in pixels])

    def _check_finite(self, decoded: torch.Tensor, class_name: str) -> None:
        """Raise if a pixel is not finite; clipping to the range of pixels would hide it."""
        if not decoded.isfinite().all():
            dtype = self._params.dtype
            remedy = "Check its weights" if dtype == "float32" else "Set synthesize.dtype to float32"
            raise PipelineError(
                f"The frozen model gives images of {class_name!r} that are not finite in {dtype}. {remedy}."
            )

    def _resize(self, image: np.ndarray) -> np.ndarray:
        if image.shape[0] == self._image_size:
            return image
        return np.asarray(Image.fromarray(image).resize((self._image_size,) * 2, Image.Resampling.BICUBIC))
