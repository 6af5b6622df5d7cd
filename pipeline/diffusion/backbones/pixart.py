"""PixArt-alpha and -Sigma: a diffusion transformer with cross-attention to T5 (Chen et al., ICLR 2024).

The paper reads a UNet and leaves transformers open; here blocks take the place of its layers. A block's output tokens
(B, N, C) become a map of half the latents' side.
"""

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from pipeline.diffusion.backbones.base import Conditioning, TokenBackbone
from pipeline.diffusion.backbones.text import T5Encoder, encode, masked_mean

_TEXT_LENGTH = 120  # PixArt-alpha's; Sigma was trained with up to 300, which short prompts do not need


class PixArtBackbone(TokenBackbone):
    """A PixArtTransformer2DModel with a T5 text encoder."""

    model_class = PixArtTransformer2DModel

    def encode_prompts(self, prompts: list[str], sizes: list[int] | None = None) -> Conditioning:
        """Return T5's token states (K, T, E) and their mask; prompts are compared by the mean of their tokens."""
        encoder = T5Encoder(self.path, "", _TEXT_LENGTH, self.device, self.dtype, masked=True)
        tensors = encode(encoder, prompts, sizes, self._tensors)
        return Conditioning(tensors, tensors.pop("similarity").cpu())

    def _tensors(self, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        mean = masked_mean(states, mask)
        return {"encoder_hidden_states": states.to(self.dtype), "encoder_attention_mask": mask, "similarity": mean}

    def _denoise(self, noisy: Tensor, timestep: int, conditioning: dict[str, Tensor]) -> None:
        batch = len(noisy)
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self._model.use_additional_conditions:
            side = self._image_side(noisy)
            added = {"resolution": noisy.new_full((batch, 2), side), "aspect_ratio": noisy.new_ones((batch, 1))}
        timesteps = torch.full((batch,), timestep, device=noisy.device)
        self._model(noisy, timestep=timesteps, added_cond_kwargs=added, return_dict=False, **conditioning)
