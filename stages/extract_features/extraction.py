"""The computation itself: images -> latents -> noised latents -> maps per prompt -> pooled representations.

Per image the VAE encodes once and one noise is drawn from a generator keyed by (noise_seed, index), shared by all its
prompts; pairs (image, prompt) are flattened into batches of a fixed shape. Only (pairs, D) float16 leave the device,
once a shard. A pair whose maps overflow the model's 16-bit type is computed again in float32 (prompted_model.py).
"""

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.datasets import Images
from pipeline.diffusion import batching, noise, representation
from pipeline.diffusion.backbones import Backbone, Conditioning
from pipeline.diffusion.batching import Batcher
from pipeline.diffusion.image_conditioning import ImageEncoder
from pipeline.diffusion.prompted_model import Inputs, PromptedModel
from pipeline.diffusion.prompts import PromptSet
from pipeline.diffusion.representation import Moments, Projector
from pipeline.errors import PipelineError
from pipeline.feature_store import Basis, Features, LayerBasis
from pipeline.progress import progress_bar
from pipeline.settings.params import ExtractFeatures, Runtime

log = logging.getLogger(__name__)

_LARGEST = torch.finfo(torch.float16).max


class HostInput(NamedTuple):
    """What the processor prepares of n images: uint8 (n, H, W, 3) and their noise, float32 (n, C, h, w)."""

    images: np.ndarray
    noise: Tensor


class Extraction:
    """A frozen model, ready to represent images."""

    def __init__(
        self,
        backbone: Backbone,
        image_encoder: ImageEncoder | None,
        prompt_set: PromptSet,
        params: ExtractFeatures,
        runtime: Runtime,
        data: Images,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Encodes the prompts and finds the batch size; `check` is called before each batch and may raise to stop."""
        self.backbone, self.params, self.data, self._check = backbone, params, data, check
        self._image_encoder = image_encoder
        self._model = PromptedModel(backbone, prompt_set, params.denoise_prompt)
        self.prompts_per_image = len(self.prompts_of(np.zeros(1, np.int64))[0])
        self.latent_shape = backbone.encode_images(data.take(np.zeros(1, np.int64)).images, params.image_size).shape[1:]
        positions = int(np.prod(self.latent_shape[1:]))
        workers = batching.workers_for(backbone.device, positions)
        size = batching.batch_size(runtime.unet_batch_size, backbone.device, positions, self._blank_pass)
        if runtime.compile:
            backbone.compile()
        self.batcher = Batcher(size, workers, check)
        pixels = params.image_size**2
        vae_batch = batching.CPU_BATCH if backbone.device == "cpu" else max(1, min(32, 32 * 256**2 // pixels))
        self._vae_batcher = Batcher(min(vae_batch, self.batcher.batch_size), workers, check)
        if runtime.compile:
            self._warm_up()

    @property
    def conditioning(self) -> Conditioning:
        """All prompts, the generic one last."""
        return self._model.conditioning

    @property
    def passes(self) -> int:
        """Passes of the denoiser so far: pairs of an image and a prompt, those redone in float32 counted again."""
        return self.batcher.computed + self.redone

    @property
    def redone(self) -> int:
        """Pairs of an image and a prompt that were computed again in float32 so far."""
        return self._model.redone

    def prompts_of(self, index: np.ndarray) -> np.ndarray:
        """int16 (n, P): the prompts of these images."""
        params = self.params
        return self._model.prompts_of(self.data.labels[index], index, params.negatives, params.noise_seed)

    def host_input(self, index: np.ndarray) -> HostInput:
        """Reads these images and draws their noise: the processor's part, to be done ahead of the device's."""
        drawn = noise.draw(self.latent_shape, self.params.noise_seed, index)
        return HostInput(self.data.take(index).images, drawn)

    def encode(self, images: np.ndarray) -> Tensor:
        """uint8 (n, H, W, 3) -> latents, float32 (n, C, h, w) on the device."""

        def batch(index: Tensor) -> Tensor:
            return self.backbone.encode_images(images[index.numpy()], self.params.image_size)

        return self._vae_batcher.table(batch, len(images), lambda done: None)

    def inputs(self, host: HostInput, latents: Tensor) -> Inputs:
        """Noises the latents, and embeds the images where they condition."""
        noisy = self.backbone.add_noise(latents, host.noise.to(latents.device), self.params.timestep)
        if self._image_encoder is None:
            return Inputs(noisy, None)
        encoder = self._image_encoder

        def batch(rows: Tensor) -> Tensor:
            return encoder(host.images[rows.numpy()])

        return Inputs(noisy, self._vae_batcher.table(batch, len(noisy), lambda done: None))

    def represent(self, index: np.ndarray, inputs: Inputs, projector: Projector, bar: Any) -> tuple[Features, int]:
        """All representations of these images, and how many pairs were redone in float32.

        Raises:
            PipelineError: A number exceeds the range of float16.
        """
        own = self.prompts_of(index)  # (n, P)
        generic = np.full((len(index), 1), self._model.generic)
        text = torch.from_numpy(np.concatenate([generic, own], axis=1).astype(np.int64)).flatten()  # (n * (1+P),)
        image = torch.arange(len(index)).repeat_interleave(1 + own.shape[1])

        def batch(rows: Tensor) -> Tensor:
            return projector(self.maps(inputs, image[rows], text[rows])).half()

        before = self.redone
        table = self.batcher.table(batch, len(text), lambda done: bar.update(done / (1 + own.shape[1])))
        self._check_fits_float16(table)
        self._model.warn_of_redone(before, len(text), "the shard")
        values = table.cpu().numpy().reshape(len(index), 1 + own.shape[1], -1)  # (n, 1+P, D)
        return Features(index, self.data.labels[index], values[:, 0], values[:, 1:], own), self.redone - before

    def fit_basis(self, index: np.ndarray) -> Basis:
        """PCA of the layers over these images' denoising maps, in one pass; and a second one for mean and std.

        The statistics are of what the finished basis makes of the same images, so they can only be had after it.
        """
        inputs = self.clean_inputs(index)
        before = self.redone
        with progress_bar(2 * len(index), "fit basis", "image") as bar:
            layers = self.fit_layers(self.moments(inputs, bar))
            values = self.pooled(inputs, layers, bar)
        self._model.warn_of_redone(before, 2 * len(index), "the basis")
        return Basis(layers, values.mean(0), values.std(0))

    def clean_inputs(self, index: np.ndarray) -> Inputs:
        """These images, read, encoded and noised."""
        host = self.host_input(index)
        return self.inputs(host, self.encode(host.images))

    def moments(self, inputs: Inputs, bar: Any) -> dict[str, Moments]:
        """Layer -> the moments of all positions of these images' denoising maps."""
        device = "cpu" if self.backbone.device == "mps" else self.backbone.device  # mps has no float64
        moments = {layer: Moments(channels, device) for layer, channels in self.backbone.channels.items()}
        for rows, maps in self.batcher.map(self._denoising(inputs), len(inputs.noisy)):
            for layer, of_batch in maps.items():
                for part in of_batch[: rows.stop - rows.start].split(batching.CPU_BATCH):  # the same for any batch
                    moments[layer].update(part.to(device))
            bar.update(rows.stop - rows.start)
        return moments

    def fit_layers(self, moments: dict[str, Moments]) -> dict[str, LayerBasis]:
        """Layer -> its PCA, of as many dimensions as are wanted."""
        dims = dict(zip(moments, self.params.dims, strict=True))
        return {layer: representation.fit_basis(of_layer, dims[layer]) for layer, of_layer in moments.items()}

    def pooled(self, inputs: Inputs, layers: dict[str, LayerBasis], bar: Any) -> np.ndarray:
        """float64 (n, D): the denoising representations of these images on a basis.

        Raises:
            PipelineError: A number exceeds the range of float16, which the shards would hold it in.
        """
        projector, maps = Projector(layers, self.backbone.device), self._denoising(inputs)
        pooled = self.batcher.table(lambda rows: projector(maps(rows)), len(inputs.noisy), bar.update)
        self._check_fits_float16(pooled)
        return pooled.double().cpu().numpy()

    def _denoising(self, inputs: Inputs) -> Callable[[Tensor], dict[str, Tensor]]:
        """Rows -> maps under the generic prompt, which comes last."""
        text = torch.full((len(inputs.noisy),), self._model.generic)
        return lambda rows: self.maps(inputs, rows, text[rows])

    def maps(self, inputs: Inputs, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Layer -> finite maps of the pairs (image, text), float32 (B, C_l, h_l, w_l)."""
        return self._model.finite_maps(inputs, self.params.timestep, image, text)

    def _check_fits_float16(self, table: Tensor) -> None:
        """Checks pooled features (n, D), as every shard holds them.

        Raises:
            PipelineError: one exceeds float16's range; names its layer.
        """
        fits = table.half().isfinite().all(0).cpu().numpy()  # (D,)
        for layer, (start, stop) in representation.column_ranges(self.backbone.channels, self.params.dims).items():
            if not fits[start:stop].all():
                raise PipelineError(
                    f"{layer} gives features beyond {_LARGEST:g}, the largest number of a "
                    f"feature set's float16, at timestep {self.params.timestep}. Leave the layer out of "
                    "extract_features.layers, or set a smaller image_size"
                )

    def _blank_pass(self, rows: Tensor) -> dict[str, Tensor]:
        noisy = torch.zeros(len(rows), *self.latent_shape, device=self.backbone.device)
        return self.backbone.features(noisy, self.params.timestep, self.conditioning.take(rows * 0))

    def _warm_up(self) -> None:
        started = time.perf_counter()
        self._blank_pass(torch.zeros(self.batcher.batch_size, dtype=torch.int64))
        if self.backbone.device.startswith("cuda"):
            torch.cuda.synchronize(self.backbone.device)
        log.info("compiled in %.1f s", time.perf_counter() - started)
