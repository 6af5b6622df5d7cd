"""Run a sample of the training images through the frozen model: encode once, then read all layers of every pass.

Per timestep, each image has one pass with the generic prompt, and the first `margin_images` have one more with each of
their own prompts. Latents, prompts and noise are those of extract-features. Maps can only be pooled on a PCA basis,
which is fitted on maps: those of the first images, for the basis and the pictures, are held in memory until then (4 MB
per image for Stable Diffusion at 224 pixels), and the others are pooled as they are computed. No pair (image, prompt)
runs twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.data.datasets import Images
from pipeline.diffusion import batching, representation
from pipeline.diffusion.prompted_model import Inputs
from pipeline.diffusion.prompts import PromptSet
from pipeline.diffusion.representation import Moments, Projector
from pipeline.diffusion.session import FrozenSession
from pipeline.feature_store import LayerBasis, positive_matches
from pipeline.settings.params import SweepFeatures

Maps = dict[str, Tensor]


@dataclass(frozen=True)
class LayerFeatures:
    """One layer at one timestep."""

    values: np.ndarray  # float32 (n, d), the energies of its leading principal components
    prompted: np.ndarray  # float32 (m, P, d), those of the first m images under each of their prompts
    explained_variance: float  # share of the layer's variance that these components explain
    colours: np.ndarray  # uint8 (p, h, w, 3), the first p images' maps on the first three components


class Sample:
    """A sample of images, as latents on the device, with their noise and prompts."""

    def __init__(
        self, session: FrozenSession, params: SweepFeatures, prompt_set: PromptSet, data: Images, index: np.ndarray
    ) -> None:
        """Encode the images at `index`, int64 (n,), of the training split.

        The session has all layers and these prompts. The first images serve for basis, pictures and margins.
        """
        self._session, self._params = session, params
        self.images = data.take(index).images  # uint8 (n, H, W, 3)
        self._latents, self._embeddings = session.encode(self.images), session.embed(self.images)
        self._noise = session.noise(index).to(self._latents.device)
        with_own_prompts = index[: params.margin_images]
        labels = data.labels[with_own_prompts]
        self._own = session.prompts_of(labels, with_own_prompts)  # (m, P)
        self.positive = positive_matches(prompt_set.positive, self._own, labels).argmax(1)  # (m,), matching columns
        self.num_prompts = self._own.shape[1]  # P

    def represent(self, timestep: int, done: Callable[[int], object]) -> dict[str, LayerFeatures]:
        """Compute all layers at a timestep; `done` is called with the number of passes of each batch."""
        model = self._session.model
        inputs = self._session.inputs(self._latents, self._noise, self._embeddings, timestep)
        before = model.redone
        everyone = torch.arange(len(self.images))
        passes = self._passes(inputs, timestep, everyone, torch.full_like(everyone, model.generic), done)
        kept = max(self._params.basis_images, self._params.picture_images)
        first = _first(passes, min(kept, len(everyone)))
        full = {layer: self._fit(maps[: self._params.basis_images]) for layer, maps in first.items()}
        leading = {layer: self._leading(basis) for layer, basis in full.items()}
        projector = Projector(leading, self._session.backbone.device)
        values = torch.cat([projector(first), *(projector(maps) for maps in passes)]).cpu().numpy()  # (n, D)
        prompted = self._prompted(inputs, timestep, projector, values.shape[1], done)
        model.warn_of_redone(before, len(everyone) + self._own.size, f"timestep {timestep}")
        dims = [len(basis.components) for basis in leading.values()]
        return {
            layer: LayerFeatures(
                values[:, start:stop],
                prompted[:, :, start:stop],
                float(leading[layer].explained_variance.sum() / (leading[layer].total_variance or 1)),
                as_colours(first[layer][: self._params.picture_images].cpu(), full[layer]),
            )
            for layer, (start, stop) in representation.column_ranges(self._session.backbone.channels, dims).items()
        }

    def _prompted(
        self, inputs: Inputs, timestep: int, projector: Projector, dims: int, done: Callable[[int], object]
    ) -> np.ndarray:
        """Represent the first m images under each of their prompts, float32 (m, P, dims)."""
        image = torch.arange(len(self._own)).repeat_interleave(self.num_prompts)
        text = torch.from_numpy(self._own.astype(np.int64)).flatten()
        pooled = [projector(maps).cpu().numpy() for maps in self._passes(inputs, timestep, image, text, done)]
        return np.concatenate(pooled or [np.empty((0, dims), np.float32)]).reshape(*self._own.shape, dims)

    def _passes(
        self, inputs: Inputs, timestep: int, image: Tensor, text: Tensor, done: Callable[[int], object]
    ) -> Iterator[Maps]:
        """Yield the maps of pairs (image, text) by batch: layer -> float32 (b, C_l, h_l, w_l)."""

        def one_pass(rows: Tensor) -> Maps:
            return self._session.model.finite_maps(inputs, timestep, image[rows], text[rows])

        for rows, maps in self._session.batcher.map(one_pass, len(text)):
            done(rows.stop - rows.start)
            yield {layer: of_batch[: rows.stop - rows.start] for layer, of_batch in maps.items()}

    def _fit(self, maps: Tensor) -> LayerBasis:
        """Fit all principal components of one layer's maps (b, C, h, w)."""
        device = "cpu" if maps.device.type == "mps" else str(maps.device)  # mps has no float64
        moments = Moments(maps.shape[1], device)
        for part in maps.split(batching.CPU_BATCH):
            moments.update(part.to(device))
        return representation.fit_basis(moments, maps.shape[1])

    def _leading(self, basis: LayerBasis) -> LayerBasis:
        dims = min(fewest_dims(basis, self._params.explained_variance), self._params.max_dims)
        return replace(basis, components=basis.components[:dims], explained_variance=basis.explained_variance[:dims])


def fewest_dims(basis: LayerBasis, share: float) -> int:
    """Return the smallest number of leading components, at least 1, that explain `share` of the variance."""
    held = basis.explained_variance.cumsum() / (basis.total_variance or 1)
    return min(int((held < share - 1e-9).sum()) + 1, len(held))


def as_colours(maps: Tensor, basis: LayerBasis) -> np.ndarray:
    """Show the first three components of maps, float32 (m, C, h, w) on the CPU, as colours, uint8 (m, h, w, 3).

    0 to 255 is the 1st to the 99th percentile of all m; components that a layer does not have are 0.
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
    """Join the maps of the first batches, until they have at least `count` images."""
    batches: list[Maps] = []
    while sum(len(next(iter(maps.values()))) for maps in batches) < count:
        batches.append(next(passes))
    return {layer: torch.cat([maps[layer] for maps in batches]) for layer in batches[0]}
