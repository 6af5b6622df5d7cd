"""The frozen model under its prompts: pairs (image, prompt) -> maps.

The prompts of a set are numbered from 0; the generic one of the denoising representation comes after them. Text is
encoded once. Where an image encoder conditions, its embedding goes into an image's own prompts, never the generic one.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion import distinct_prompts, prompts
from pipeline.diffusion.backbones import Backbone
from pipeline.diffusion.prompts import PromptSet


@dataclass(frozen=True)
class Inputs:
    """n images on the device: noised latents float32 (n, C, h, w); image embeddings (n, E) or None."""

    noisy: Tensor
    embeddings: Tensor | None


class PromptedModel:
    """A frozen model that has read its prompts."""

    def __init__(self, backbone: Backbone, prompt_set: PromptSet, generic: str) -> None:
        """Encodes the prompts, the texts of one averaged, and then `generic`.

        Raises:
            PipelineError: The model cannot tell two prompts of the set apart.
        """
        texts = [*prompt_set.texts, [generic]]
        self.backbone = backbone
        self.conditioning = backbone.encode_prompts([text for group in texts for text in group], list(map(len, texts)))
        self.generic = len(prompt_set.texts)
        distinct_prompts.check(self.conditioning, prompt_set)
        self._prompt_set = prompt_set

    def prompts_of(
        self, labels: np.ndarray, index: np.ndarray, negatives: Literal["all"] | int, seed: int
    ) -> np.ndarray:
        """int16 (n, P): the prompts of these images; the arguments as `prompts.assign` has them."""
        similarity = self.conditioning.similarity.numpy()[: self.generic]
        return prompts.assign(self._prompt_set, negatives, labels, index, similarity, seed)

    def maps(self, inputs: Inputs, timestep: int, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """One pass of each pair.

        Args:
            inputs: the images, noised for this timestep.
            timestep: 0 <= t <= 999.
            image: int64 (B,), rows of `inputs`.
            text: int64 (B,), numbers of prompts.

        Returns:
            Layer -> float32 (B, C_l, h_l, w_l).
        """
        chosen = self.conditioning.take(text)
        if inputs.embeddings is not None:
            of_pair = inputs.embeddings[image.to(inputs.embeddings.device)]  # (B, E)
            generic = (text == self.generic).to(of_pair.device)
            chosen = self.backbone.with_image(chosen, torch.where(generic[:, None], 0, of_pair))
        return self.backbone.features(inputs.noisy[image.to(inputs.noisy.device)], timestep, chosen)
