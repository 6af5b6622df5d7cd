"""Some training images before the frozen model: encoded once, then all layers of every pass.

An image passes once a timestep under the generic prompt, and `margin_images` of them once more under each of their own
prompts, matching and not; latents, prompts and noise are those that extract-features would take. A PCA basis is needed
before maps can be pooled, and it is of the maps: those of the first `basis_images` images are held in memory until it
is fitted, the others are pooled as they come. The price is memory, 4 MB an image for Stable Diffusion at 224 pixels; no
pair of an image and a prompt passes twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline import devices
from pipeline.data.datasets import Images
from pipeline.diffusion import backbones, batching, image_conditioning, noise, representation
from pipeline.diffusion.batching import Batcher
from pipeline.diffusion.prompted_model import Inputs, PromptedModel
from pipeline.diffusion.prompts import PromptSet
from pipeline.diffusion.representation import Moments, Projector
from pipeline.feature_store import LayerBasis, positive_columns
from pipeline.settings.config import Config

Maps = dict[str, Tensor]


@dataclass(frozen=True)
class LayerFeatures:
    """One layer at one timestep.

    Attributes:
        values: float32 (n, d), the energies of its leading principal components.
        prompted: float32 (m, P, d), those of the first m images under each of their prompts.
        explained_variance: share of the layer's variance that they hold.
        colours: uint8 (p, h, w, 3), the first p images' maps on the first three components.
    """

    values: np.ndarray
    prompted: np.ndarray
    explained_variance: float
    colours: np.ndarray


class Sample:
    """Images on the device as latents, with the noise and the prompts of each.

    Attributes:
        images: uint8 (n, H, W, 3).
        positive: int64 (m,), which of its P prompts matches each of the first m images.
        num_prompts: P.
    """

    def __init__(self, config: Config, prompt_set: PromptSet, data: Images, index: np.ndarray) -> None:
        """Loads the frozen model and encodes the images.

        Args:
            config: the project's configuration.
            prompt_set: the prompts of `data`.
            data: the training split.
            index: int64 (n,), positions in it; those first are the basis's, the pictures' and those that are seen
                under their own prompts.

        Raises:
            PipelineError: the model cannot be loaded.
        """
        params, runtime = config.params.extract_features, config.params.runtime
        device, dtype = devices.resolve(runtime.device), getattr(torch, params.dtype)
        self.backbone = backbones.load(config.backbone_dir, "all", device, dtype)
        self._model = PromptedModel(self.backbone, prompt_set, params.denoise_prompt)
        if runtime.compile:
            self.backbone.compile()
        self.images = data.take(index).images
        self._params = config.params.sweep_features
        self._latents = self._in_batches(lambda images: self.backbone.encode_images(images, params.image_size))
        encoder = image_conditioning.load(config, device)
        self._embeddings = self._in_batches(encoder) if encoder else None
        self._noise = noise.draw(tuple(self._latents.shape[1:]), params.noise_seed, index).to(device)
        under_own = slice(0, self._params.margin_images)
        labels = data.labels[index[under_own]]
        self._own = self._model.prompts_of(labels, index[under_own], params.negatives, params.noise_seed)  # (m, P)
        self.positive = positive_columns(prompt_set.positive, self._own, labels)
        self.num_prompts = self._own.shape[1]
        positions = int(np.prod(self._latents.shape[2:]))
        size = batching.batch_size(runtime.unet_batch_size, device, positions, self._blank_pass)
        self._batcher = Batcher(size, batching.workers_for(device, positions))

    def represent(self, timestep: int, done: Callable[[int], object]) -> dict[str, LayerFeatures]:
        """All layers at this timestep; `done` is told of every batch's passes.

        Raises:
            PipelineError: the maps are not finite, even in float32.
        """
        inputs = Inputs(self.backbone.add_noise(self._latents, self._noise, timestep), self._embeddings)
        before = self._model.redone
        everyone = torch.arange(len(self.images))
        passes = self._passes(inputs, timestep, everyone, torch.full_like(everyone, self._model.generic), done)
        first = _first(passes, min(self._params.basis_images, len(everyone)))
        full = {layer: self._fit(maps[: self._params.basis_images]) for layer, maps in first.items()}
        kept = {layer: self._leading(basis) for layer, basis in full.items()}
        projector = Projector(kept, self.backbone.device)
        values = torch.cat([projector(first), *(projector(maps) for maps in passes)]).cpu().numpy()  # (n, D)
        prompted = self._prompted(inputs, timestep, projector, values.shape[1], done)
        self._model.warn_of_redone(before, len(everyone) + self._own.size, f"timestep {timestep}")
        dims = [len(basis.components) for basis in kept.values()]
        return {
            layer: LayerFeatures(
                values[:, start:stop],
                prompted[:, :, start:stop],
                float(kept[layer].explained_variance.sum() / (kept[layer].total_variance or 1)),
                as_colours(first[layer][: self._params.picture_images].cpu(), full[layer]),
            )
            for layer, (start, stop) in representation.column_ranges(self.backbone.channels, dims).items()
        }

    def _prompted(
        self, inputs: Inputs, timestep: int, projector: Projector, dims: int, done: Callable[[int], object]
    ) -> np.ndarray:
        """float32 (m, P, dims): the first images under each of their prompts."""
        image = torch.arange(len(self._own)).repeat_interleave(self.num_prompts)
        text = torch.from_numpy(self._own.astype(np.int64)).flatten()
        pooled = [projector(maps).cpu().numpy() for maps in self._passes(inputs, timestep, image, text, done)]
        return np.concatenate(pooled or [np.empty((0, dims), np.float32)]).reshape(*self._own.shape, dims)

    def _passes(
        self, inputs: Inputs, timestep: int, image: Tensor, text: Tensor, done: Callable[[int], object]
    ) -> Iterator[Maps]:
        """The maps of pairs (image, text), batch by batch: layer -> float32 (b, C_l, h_l, w_l)."""

        def one_pass(rows: Tensor) -> Maps:
            return self._model.finite_maps(inputs, timestep, image[rows], text[rows])

        for rows, maps in self._batcher.map(one_pass, len(text)):
            done(rows.stop - rows.start)
            yield {layer: of_batch[: rows.stop - rows.start] for layer, of_batch in maps.items()}

    def _in_batches(self, encode: Callable[[np.ndarray], Tensor]) -> Tensor:
        """Calls `encode` on all images, uint8 (b, H, W, 3) at a time."""
        encoder = Batcher(batching.CPU_BATCH)
        return encoder.table(lambda rows: encode(self.images[rows.numpy()]), len(self.images), lambda done: None)

    def _fit(self, maps: Tensor) -> LayerBasis:
        """All principal components of one layer's maps (b, C, h, w)."""
        device = "cpu" if maps.device.type == "mps" else str(maps.device)  # mps has no float64
        moments = Moments(maps.shape[1], device)
        for part in maps.split(batching.CPU_BATCH):
            moments.update(part.to(device))
        return representation.fit_basis(moments, maps.shape[1])

    def _leading(self, basis: LayerBasis) -> LayerBasis:
        dims = min(fewest_dims(basis, self._params.explained_variance), self._params.max_dims)
        return replace(basis, components=basis.components[:dims], explained_variance=basis.explained_variance[:dims])

    def _blank_pass(self, rows: Tensor) -> Maps:
        noisy = torch.zeros(len(rows), *self._latents.shape[1:], device=self.backbone.device)
        return self.backbone.features(noisy, 0, self._model.conditioning.take(rows * 0))


def fewest_dims(basis: LayerBasis, share: float) -> int:
    """The smallest number of leading components, at least 1, that hold `share` of the variance; `basis` has all."""
    held = basis.explained_variance.cumsum() / (basis.total_variance or 1)
    return min(int((held < share - 1e-9).sum()) + 1, len(held))


def as_colours(maps: Tensor, basis: LayerBasis) -> np.ndarray:
    """The first three principal components as red, green and blue, from their 1st to their 99th percentile.

    Args:
        maps: float32 (m, C, h, w) on the CPU; the range is that of all m.
        basis: of this layer.

    Returns:
        uint8 (m, h, w, 3); blue or green are 0 where a layer has fewer channels.
    """
    vectors = maps.permute(0, 2, 3, 1).numpy() - basis.mean  # (m, h, w, C)
    scores = vectors @ basis.components[:3].T  # (m, h, w, up to 3)
    colours = np.zeros((*scores.shape[:3], 3), np.uint8)
    if scores.size:
        low, high = np.percentile(scores, [1, 99], axis=(0, 1, 2))
        shares = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
        colours[..., : scores.shape[3]] = np.rint(255 * shares)
    return colours


def _first(passes: Iterator[Maps], count: int) -> Maps:
    """The maps of the first batches, joined, of at least `count` images."""
    batches: list[Maps] = []
    have = 0
    while have < count:
        batches.append(next(passes))
        have += len(next(iter(batches[-1].values())))
    return {layer: torch.cat([maps[layer] for maps in batches]) for layer in batches[0]}
