"""Sana: a transformer with linear attention over latents of a 32nd of the image's side (Xie et al., ICLR 2025).

It is trained by flow matching. Its text encoder is Gemma, whose instructions to rewrite prompts ("complex human
instruction" of the pipeline) are left out: the prompts of one data set differ in a word, and an instruction of hundreds
of tokens before it would make them more alike.
"""

from typing import Any

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor

from pipeline.diffusion.backbones.base import Conditioning, FlowTokenBackbone
from pipeline.diffusion.backbones.text import GemmaEncoder, encode, masked_mean

_TEXT_LENGTH = 300


class SanaBackbone(FlowTokenBackbone):
    """A SanaTransformer2DModel with a Gemma text encoder and an AutoencoderDC."""

    model_class = SanaTransformer2DModel
    vae_class = AutoencoderDC

    def encode_prompts(self, prompts: list[str], sizes: list[int] | None = None) -> Conditioning:
        """Return Gemma's token states (K, T, E) and their mask; prompts are compared by the mean of their tokens."""

        def tensors(states: Tensor, mask: Tensor) -> dict[str, Tensor]:
            return {
                "encoder_hidden_states": states.to(self.dtype),
                "encoder_attention_mask": mask,
                "similarity": masked_mean(states, mask),
            }

        encoder = GemmaEncoder(self.path, _TEXT_LENGTH, self.device, self.dtype)
        encoded = encode(encoder, [prompt.lower().strip() for prompt in prompts], sizes, tensors)
        return Conditioning(encoded, encoded.pop("similarity").cpu())

    def _encode(self, pixels: Tensor) -> Tensor:
        return self._vae.encode(pixels).latent

    def _denoise(self, noisy: Tensor, timestep: int, conditioning: dict[str, Tensor]) -> None:
        scale: Any = self._model.config.timestep_scale
        timesteps = torch.full((len(noisy),), timestep * scale, device=noisy.device)
        self._model(noisy, timestep=timesteps, return_dict=False, **conditioning)
