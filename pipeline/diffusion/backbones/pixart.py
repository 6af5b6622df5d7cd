"""PixArt-alpha and -Sigma: a diffusion transformer with cross-attention to T5 (Chen et al., ICLR 2024).

The paper reads a UNet and leaves transformers open; here chosen blocks stand for its layers. A block's output tokens
(B, N, C) become a map of half the latents' side.
"""

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from pipeline.diffusion.backbones.base import Conditioning, TokenBackbone
from pipeline.diffusion.backbones.text import t5_states

_TEXT_LENGTH = 120  # PixArt-alpha's; Sigma was trained with up to 300, which short prompts do not need


class PixArtBackbone(TokenBackbone):
    """A PixArtTransformer2DModel with a T5 text encoder."""

    model_class = PixArtTransformer2DModel

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """T5's token states (K, T, E) and their mask; prompts are compared by the mean of their tokens."""
        states, mask = t5_states(self.path, "", prompts, _TEXT_LENGTH, self.device, self.dtype, masked=True)
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        tensors = {"encoder_hidden_states": states.to(self.dtype), "encoder_attention_mask": mask}
        return Conditioning(tensors, mean.cpu())

    def _denoise(self, noisy: Tensor, timestep: int, conditioning: dict[str, Tensor]) -> None:
        batch = len(noisy)
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self._model.use_additional_conditions:
            side = noisy.shape[-1] * 2 ** (len(self._vae.config.block_out_channels) - 1)
            added = {
                "resolution": noisy.new_full((batch, 2), side),
                "aspect_ratio": noisy.new_ones((batch, 1)),
            }
        self._model(
            noisy,
            timestep=torch.full((batch,), timestep, device=noisy.device),
            added_cond_kwargs=added,
            return_dict=False,
            **conditioning,
        )
