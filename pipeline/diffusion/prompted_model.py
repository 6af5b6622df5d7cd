"""The frozen model with its encoded prompts: pairs (image, prompt) -> maps.

The prompts of a set are numbered from 0, followed by the generic prompt of the denoising representation. Text is
encoded once. With image conditioning, an image's embedding is added to its own prompts, never to the generic one.
"""

import functools
import logging
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline import devices
from pipeline.diffusion import batching, distinct_prompts, prompts
from pipeline.diffusion.backbones import Backbone
from pipeline.diffusion.batching import Batcher
from pipeline.diffusion.prompts import PromptSet
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """n images on the device: noised latents float32 (n, C, h, w); image embeddings (n, E) or None."""

    noisy: Tensor
    embeddings: Tensor | None


class PromptedModel:
    """A frozen model that has encoded its prompts.

    Attributes:
        conditioning: All prompts, the generic one last.
        generic: The number of the generic prompt.
        recomputed: Pairs that `finite_maps` recomputed in float32 so far.
    """

    def __init__(self, backbone: Backbone, prompt_set: PromptSet, generic: str) -> None:
        """Encode the prompts, averaging the texts of each, and then `generic`; see `distinct_prompts.check`."""
        texts = [*prompt_set.texts, [generic]]
        self.backbone = backbone
        self.conditioning = backbone.encode_prompts([text for group in texts for text in group], list(map(len, texts)))
        self.generic = len(prompt_set.texts)
        self.recomputed = 0
        self._generic_text = generic
        self._lock = threading.Lock()
        distinct_prompts.check(self.conditioning, prompt_set)
        self._prompt_set = prompt_set
        similarity = self.conditioning.similarity.numpy()[: self.generic]
        self._nearest = functools.cache(functools.partial(prompts.nearest, similarity))  # (K, K) cosines, once per set

    def prompts_of(
        self, labels: np.ndarray, index: np.ndarray, negatives: Literal["all"] | int, seed: int
    ) -> np.ndarray:
        """Return the prompts of images, int16 (n, P); see `prompts.assign`."""
        return prompts.assign(self._prompt_set, negatives, labels, index, self._nearest, seed)

    def maps(self, inputs: Inputs, timestep: int, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Run one pass for each pair.

        Args:
            inputs: The images, noised for this timestep.
            timestep: 0 <= t <= 999.
            image: int64 (B,), rows of `inputs`.
            text: int64 (B,), numbers of prompts.

        Returns:
            Layer -> float32 (B, C_l, h_l, w_l).
        """
        chosen = self.conditioning.select(text)
        if inputs.embeddings is not None:
            of_pair = inputs.embeddings[devices.send(image, inputs.embeddings.device)]  # (B, E)
            generic = devices.send(text == self.generic, of_pair.device)
            chosen = self.backbone.with_image(chosen, torch.where(generic[:, None], 0, of_pair))
        return self.backbone.features(inputs.noisy[devices.send(image, inputs.noisy.device)], timestep, chosen)

    def finite_maps(self, inputs: Inputs, timestep: int, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Run `maps`; recompute pairs that overflow 16 bits in float32, and raise PipelineError if they do again."""
        maps = self.maps(inputs, timestep, image, text)
        finite = _finite(maps)  # waits for the GPU once per batch, as copying the row numbers does anyway
        if finite.all():
            return maps
        if self.backbone.dtype != torch.float32:
            rows = torch.nonzero(~finite.all(0)).flatten()
            overflowed = torch.stack([image, text], dim=1)[rows.cpu()]  # (r, 2)
            again = self._in_float32(inputs, timestep, overflowed)
            with self._lock:
                self.recomputed += len(overflowed.unique(dim=0))  # the last batch is padded with repeats
            return {layer: of_layer.index_copy(0, rows, again[layer]) for layer, of_layer in maps.items()}
        for layer, is_finite in zip(maps, finite.all(1).tolist(), strict=True):
            if not is_finite:
                raise PipelineError(
                    f"{layer} of the frozen model is not finite at timestep {timestep}, even in float32. Check its "
                    "weights, or remove the layer from extract_features.layers."
                )
        return maps

    def warn_if_recomputed(self, before: int, passes: int, what: str) -> None:
        """Log how many passes were recomputed since `recomputed` was `before`, if any."""
        if recomputed := self.recomputed - before:
            dtype = str(self.backbone.dtype).removeprefix("torch.")
            log.warning(
                "%d of %d passes of %s overflowed %s and were recomputed in float32.", recomputed, passes, what, dtype
            )

    def _in_float32(self, inputs: Inputs, timestep: int, pairs: Tensor) -> dict[str, Tensor]:
        """Return finite maps of pairs, int64 (r, 2), from the same model in float32, which is loaded at first use."""
        with self._lock:
            model = self._float32_twin

        def batch(rows: Tensor) -> dict[str, Tensor]:
            image, text = pairs[rows].unbind(1)
            return model.finite_maps(inputs, timestep, image, text)

        with batching.reproducible(self.backbone.device, torch.float32):
            # With batches of this size, on the CPU, a row's numbers do not depend on the rest of its batch.
            parts = [
                {layer: of_layer[: rows.stop - rows.start] for layer, of_layer in maps.items()}
                for rows, maps in Batcher(batching.CPU_BATCH).map(batch, len(pairs))
            ]
        return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}

    @functools.cached_property
    def _float32_twin(self) -> "PromptedModel":
        return PromptedModel(self.backbone.in_float32(), self._prompt_set, self._generic_text)


def _finite(maps: dict[str, Tensor]) -> Tensor:
    """Return which maps are finite, bool (layers, B)."""
    return torch.stack([of_layer.flatten(1).isfinite().all(1) for of_layer in maps.values()])
