"""A frozen model loaded for one data set: the steps that an extraction and a sweep have in common.

Each image is encoded by the VAE once and has one draw of noise, shared by all its prompts and timesteps. The denoiser
then runs on pairs (image, prompt).
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion import backbones, batching, noise
from pipeline.diffusion.batching import Batcher
from pipeline.diffusion.image_conditioning import ImageEncoder
from pipeline.diffusion.prompted_model import Inputs, PromptedModel
from pipeline.diffusion.prompts import PromptSet
from pipeline.settings.params import ExtractFeatures, Runtime

log = logging.getLogger(__name__)


class FrozenSession:
    """A frozen model, as `backbone` and, with its prompts encoded, as `model`; `batcher` runs the denoiser's passes."""

    def __init__(
        self,
        model_dir: Path,
        layers: list[str] | str,
        prompt_set: PromptSet,
        settings: ExtractFeatures,
        runtime: Runtime,
        device: str,
        image_encoder: Path | None = None,
        check: Callable[[], None] = lambda: None,
        agree: Callable[[Callable[[], int]], int] = lambda measure: measure(),
    ) -> None:
        """Load the model in a diffusers folder, encode the prompts and find the batch size.

        `layers` are those of `backbones.load`, and `image_encoder` is a CLIP image encoder's folder, for image
        conditioning. `check` is called before each batch and may raise to stop. `agree` gets a function that measures
        the batch size and returns the one to use, for processes that share their work. Raise PipelineError if a part
        cannot be loaded, or the model cannot tell two prompts apart.
        """
        self.backbone = backbones.load(model_dir, layers, device, getattr(torch, settings.dtype))
        self._image_encoder = ImageEncoder(image_encoder, device) if image_encoder else None
        self.model = PromptedModel(self.backbone, prompt_set, settings.denoise_prompt)
        self._settings = settings
        self._latent_shape = self.backbone.latent_shape(settings.image_size)
        positions = self._latent_shape[1] * self._latent_shape[2]
        size = agree(lambda: batching.batch_size(runtime.unet_batch_size, device, positions, self._blank_pass))
        workers = batching.workers_for(device, positions)
        self.batcher = Batcher(size, workers, check)
        # Activations of the VAE grow with the pixels: 32 images of 256 x 256 at most on a GPU.
        vae_batch = batching.CPU_BATCH if device == "cpu" else max(1, min(32, 32 * 256**2 // settings.image_size**2))
        self._vae_batcher = Batcher(min(vae_batch, size), workers, check)
        if runtime.compile:
            self.backbone.compile()
            self._warm_up()

    @property
    def passes(self) -> int:
        """Number of passes of the denoiser so far; pairs recomputed in float32 count twice."""
        return self.batcher.computed + self.model.recomputed

    def prompts_of(self, labels: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the prompts, int16 (n, P), of images with these labels and positions in the data set, int64 (n,)."""
        return self.model.prompts_of(labels, index, self._settings.negatives, self._settings.noise_seed)

    def encode(self, images: np.ndarray) -> Tensor:
        """Encode images uint8 (n, H, W, 3) as latents, float32 (n, C, h, w) on the device."""

        def batch(rows: Tensor) -> Tensor:
            return self.backbone.encode_images(images[rows.numpy()], self._settings.image_size)

        return self._vae_batcher.table(batch, len(images), lambda done: None)

    def embed(self, images: np.ndarray) -> Tensor | None:
        """Embed images for image conditioning, float32 (n, E) on the device; None without it."""
        if (encoder := self._image_encoder) is None:
            return None
        return self._vae_batcher.table(lambda rows: encoder(images[rows.numpy()]), len(images), lambda done: None)

    def noise(self, index: np.ndarray) -> Tensor:
        """Draw the noise of the images at `index`, float32 (n, C, h, w) on the CPU."""
        return noise.draw(self._latent_shape, self._settings.noise_seed, index)

    def inputs(self, latents: Tensor, noise: Tensor, embeddings: Tensor | None, timestep: int) -> Inputs:
        """Return the denoiser's inputs: latents noised to a timestep, and the embeddings."""
        return Inputs(self.backbone.add_noise(latents, noise.to(latents.device), timestep), embeddings)

    def _blank_pass(self, rows: Tensor) -> dict[str, Tensor]:
        noisy = torch.zeros(len(rows), *self._latent_shape, device=self.backbone.device)
        # The settings' own timestep: a compiled model would be compiled again for another one.
        return self.backbone.features(noisy, self._settings.timestep, self.model.conditioning.select(rows * 0))

    def _warm_up(self) -> None:
        started = time.perf_counter()
        self._blank_pass(torch.zeros(self.batcher.batch_size, dtype=torch.int64))
        if self.backbone.device.startswith("cuda"):
            torch.cuda.synchronize(self.backbone.device)
        log.info("compiled in %.1f s", time.perf_counter() - started)
