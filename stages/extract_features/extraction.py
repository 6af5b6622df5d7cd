"""The computation: images -> latents -> noised latents -> maps per prompt -> pooled representations.

Pairs (image, prompt) are flattened into batches of a fixed shape. Only the pooled float16 (pairs, D) leave the device,
once per shard. A pair whose maps overflow the model's 16-bit type is recomputed in float32 (prompted_model.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.datasets import Images
from pipeline.diffusion import batching, representation
from pipeline.diffusion.prompted_model import Inputs
from pipeline.diffusion.representation import Moments, Projector
from pipeline.diffusion.session import FrozenSession
from pipeline.errors import PipelineError
from pipeline.feature_store import Basis, Features, LayerBasis
from pipeline.progress import progress_bar
from pipeline.settings.params import ExtractFeatures

_FLOAT16_MAX = torch.finfo(torch.float16).max


class HostInput(NamedTuple):
    """n images prepared by the CPU, uint8 (n, H, W, 3), and their noise, float32 (n, C, h, w)."""

    images: np.ndarray
    noise: Tensor


class Extraction:
    """Computes the representations of a data set's images, `data`, by the frozen model of `session`."""

    def __init__(self, session: FrozenSession, data: Images, settings: ExtractFeatures) -> None:
        """Use a session that was made from the same settings."""
        self.session, self.data, self._settings = session, data, settings

    def host_input(self, index: np.ndarray) -> HostInput:
        """Read the images at `index` and draw their noise, which the CPU can do while the device computes."""
        return HostInput(self.data.take(index).images, self.session.noise(index))

    def inputs(self, host: HostInput, latents: Tensor) -> Inputs:
        """Noise the latents of these images, and embed the images if they condition the prompts."""
        embeddings = self.session.embed(host.images)
        return self.session.inputs(latents, host.noise, embeddings, self._settings.timestep)

    def represent(self, index: np.ndarray, inputs: Inputs, projector: Projector, bar: Any) -> tuple[Features, int]:
        """Compute all representations of the n images at positions `index`, int64 (n,).

        Return them, and how many pairs (image, prompt) were recomputed in float32; raise PipelineError if a feature
        exceeds the range of float16.
        """
        model, batcher = self.session.model, self.session.batcher
        own = self.session.prompts_of(self.data.labels[index], index)  # (n, P)
        generic = np.full((len(index), 1), model.generic)
        text = torch.from_numpy(np.concatenate([generic, own], axis=1).astype(np.int64)).flatten()  # (n * (1+P),)
        image = torch.arange(len(index)).repeat_interleave(1 + own.shape[1])

        def batch(rows: Tensor) -> Tensor:
            return projector(self.maps(inputs, image[rows], text[rows])).half()

        before = model.recomputed
        table = batcher.table(batch, len(text), lambda done: bar.update(done / (1 + own.shape[1])))
        self._check_fits_float16(table)
        model.warn_if_recomputed(before, len(text), "the shard")
        values = table.cpu().numpy().reshape(len(index), 1 + own.shape[1], -1)  # (n, 1+P, D)
        return Features(index, self.data.labels[index], values[:, 0], values[:, 1:], own), model.recomputed - before

    def fit_basis(self, index: np.ndarray) -> Basis:
        """Fit the PCA of every layer on the denoising maps of these images, and its mean and standard deviation.

        It takes two passes per image, because the statistics are of representations on the finished basis.
        """
        inputs, before = self.clean_inputs(index), self.session.model.recomputed
        with progress_bar(2 * len(index), "fit basis", "image") as bar:
            dims = dict(zip(self.session.backbone.channels, self._settings.dims, strict=True))
            moments = self.moments(inputs, bar)
            layers = {layer: representation.fit_basis(moments[layer], dims[layer]) for layer in moments}
            values = self.pooled(inputs, layers, bar)
        self.session.model.warn_if_recomputed(before, 2 * len(index), "the basis")
        return Basis(layers, values.mean(0), values.std(0))

    def clean_inputs(self, index: np.ndarray) -> Inputs:
        """Read, encode and noise the images at `index`."""
        host = self.host_input(index)
        return self.inputs(host, self.session.encode(host.images))

    def moments(self, inputs: Inputs, bar: Any) -> dict[str, Moments]:
        """Return, by layer, the moments of all positions of the images' denoising maps."""
        backbone = self.session.backbone
        device = "cpu" if backbone.device == "mps" else backbone.device  # mps has no float64
        moments = {layer: Moments(channels, device) for layer, channels in backbone.channels.items()}
        for rows, maps in self.session.batcher.map(self._denoising(inputs), len(inputs.noisy)):
            for layer, of_batch in maps.items():
                # Parts of one size, so that sums do not depend on the batch size.
                for part in of_batch[: rows.stop - rows.start].split(batching.CPU_BATCH):
                    moments[layer].update(part.to(device))
            bar.update(rows.stop - rows.start)
        return moments

    def pooled(self, inputs: Inputs, layers: dict[str, LayerBasis], bar: Any) -> np.ndarray:
        """Return the denoising representations of these images on a basis, float64 (n, D), within float16's range."""
        projector, maps = Projector(layers, self.session.backbone.device), self._denoising(inputs)
        pooled = self.session.batcher.table(lambda rows: projector(maps(rows)), len(inputs.noisy), bar.update)
        self._check_fits_float16(pooled)
        return pooled.double().cpu().numpy()

    def maps(self, inputs: Inputs, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Return, by layer, the finite maps of the pairs (image, text), float32 (B, C_l, h_l, w_l)."""
        return self.session.model.finite_maps(inputs, self._settings.timestep, image, text)

    def _denoising(self, inputs: Inputs) -> Callable[[Tensor], dict[str, Tensor]]:
        """Return a function from rows of `inputs` to their maps under the generic prompt."""
        text = torch.full((len(inputs.noisy),), self.session.model.generic)
        return lambda rows: self.maps(inputs, rows, text[rows])

    def _check_fits_float16(self, table: Tensor) -> None:
        least, largest = table.aminmax(dim=0)  # isfinite on the table would need its memory twice more
        fits = (least.half().isfinite() & largest.half().isfinite()).cpu().numpy()  # (D,)
        columns = representation.column_ranges(self.session.backbone.channels, self._settings.dims)
        for layer, (start, stop) in columns.items():
            if not fits[start:stop].all():
                raise PipelineError(
                    f"{layer} gives features beyond {_FLOAT16_MAX:g}, the largest float16, at timestep "
                    f"{self._settings.timestep}. Remove the layer from extract_features.layers, or set a smaller "
                    "image_size."
                )
