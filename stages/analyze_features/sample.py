"""Some training images before the frozen model: encoded once, then one pass an image and timestep for all layers.

The passes are those of the denoising representation (the generic prompt), as extract-features computes them: the same
latents, the same noise for an image at every timestep. A PCA basis is needed before maps can be pooled, and it is of
the maps: those of the first `basis_images` images are held in memory until it is fitted, the others are pooled as they
come. The price is memory, 4 MB an image for Stable Diffusion at 224 pixels; no image passes twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline import devices
from pipeline.config import Config
from pipeline.datasets import Images
from pipeline.diffusion import backbones, batching, noise, representation
from pipeline.diffusion.batching import Batcher
from pipeline.diffusion.representation import Moments, Projector
from pipeline.errors import PipelineError
from pipeline.feature_store import LayerBasis

Maps = dict[str, Tensor]


@dataclass(frozen=True)
class LayerFeatures:
    """One layer at one timestep.

    Attributes:
        values: float32 (n, d), the energies of its leading principal components.
        explained_variance: share of the layer's variance that they hold.
        rgb: float32 (m, h, w, 3) in 0..1, the first m images' maps on the first three components.
    """

    values: np.ndarray
    explained_variance: float
    rgb: np.ndarray


class Sample:
    """Images on the device as latents, with the noise of each."""

    def __init__(self, config: Config, data: Images, index: np.ndarray) -> None:
        """Loads the frozen model and encodes the images.

        Args:
            config: the project's configuration.
            data: the training split.
            index: int64 (n,), positions in it; those first are the basis's and the pictures'.

        Raises:
            PipelineError: the model cannot be loaded.
        """
        params, runtime = config.params.extract_features, config.params.runtime
        device, dtype = devices.resolve(runtime.device), getattr(torch, params.dtype)
        self.backbone = backbones.load(config.backbone_dir, "all", device, dtype)
        if runtime.compile:
            self.backbone.compile()
        self.images = data.take(index).images
        self._params, self._dtype = config.params.sweep_features, params.dtype
        self._prompt = self.backbone.encode_prompts([params.denoise_prompt])
        encoder = Batcher(batching.CPU_BATCH)
        self._latents = encoder.table(
            lambda rows: self.backbone.encode_images(self.images[rows.numpy()], params.image_size),
            len(index),
            lambda done: None,
        )
        self._noise = noise.draw(tuple(self._latents.shape[1:]), params.noise_seed, index).to(device)
        positions = int(np.prod(self._latents.shape[2:]))
        size = batching.batch_size(runtime.unet_batch_size, device, positions, self._blank_pass)
        self._batcher = Batcher(size, batching.workers_for(device, positions))

    def represent(self, timestep: int, done: Callable[[int], object]) -> dict[str, LayerFeatures]:
        """All layers at this timestep, in one pass an image; `done` is told of every batch's images.

        Raises:
            PipelineError: the maps overflow the model's type.
        """
        passes = self._passes(timestep, done)
        count = min(self._params.basis_images, len(self.images))
        first = _first(passes, count)
        full = {layer: self._fit(maps[:count]) for layer, maps in first.items()}
        kept = {layer: self._leading(basis) for layer, basis in full.items()}
        projector = Projector(kept, self.backbone.device)
        fused = torch.cat([projector(first), *(projector(maps) for maps in passes)]).cpu().numpy()
        dims = [len(basis.components) for basis in kept.values()]
        return {
            layer: LayerFeatures(
                fused[:, start:stop],
                float(kept[layer].explained_variance.sum() / (kept[layer].total_variance or 1)),
                as_colours(first[layer][: self._params.picture_images].cpu(), full[layer]),
            )
            for layer, (start, stop) in representation.column_ranges(self.backbone.channels, dims).items()
        }

    def _passes(self, timestep: int, done: Callable[[int], object]) -> Iterator[Maps]:
        """The maps of all images, batch by batch: layer -> float32 (b, C_l, h_l, w_l)."""
        noisy = self.backbone.add_noise(self._latents, self._noise, timestep)

        def one_pass(rows: Tensor) -> Maps:
            return self.backbone.features(noisy[rows.to(noisy.device)], timestep, self._prompt.take(rows * 0))

        for rows, maps in self._batcher.map(one_pass, len(noisy)):
            for layer, of_batch in maps.items():
                if not of_batch.isfinite().all():
                    raise PipelineError(
                        f"{layer} overflows {self._dtype} at timestep {timestep}: set extract_features.dtype to "
                        "bfloat16 or float32"
                    )
            done(rows.stop - rows.start)
            yield {layer: of_batch[: rows.stop - rows.start] for layer, of_batch in maps.items()}

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
        return self.backbone.features(noisy, 0, self._prompt.take(rows * 0))


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
        float32 (m, h, w, 3) in 0..1; blue or green are 0 where a layer has fewer channels.
    """
    vectors = maps.permute(0, 2, 3, 1).numpy() - basis.mean  # (m, h, w, C)
    scores = vectors @ basis.components[:3].T  # (m, h, w, up to 3)
    colours = np.zeros((*scores.shape[:3], 3), np.float32)
    if scores.size:
        low, high = np.percentile(scores, [1, 99], axis=(0, 1, 2))
        colours[..., : scores.shape[3]] = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colours


def _first(passes: Iterator[Maps], count: int) -> Maps:
    """The maps of the first batches, joined, of at least `count` images."""
    batches: list[Maps] = []
    have = 0
    while have < count:
        batches.append(next(passes))
        have += len(next(iter(batches[-1].values())))
    return {layer: torch.cat([maps[layer] for maps in batches]) for layer in batches[0]}
