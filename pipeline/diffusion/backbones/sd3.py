"""Stable Diffusion 3: a joint text and image transformer trained by flow matching (Esser et al., ICML 2024).

Noising is linear: x_sigma = (1 - sigma) * x_0 + sigma * noise, and the model's input is 1000 * sigma. A timestep t
therefore means sigma = t / 1000: 300 is three parts noise to seven parts image, less noise than timestep 300 of Stable
Diffusion 1's schedule. The `shift` determines which sigmas a sampler visits and does not matter here.
"""

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional

from pipeline.diffusion.backbones.base import Conditioning, FlowTokenBackbone
from pipeline.diffusion.backbones.text import ClipEncoder, T5Encoder, clip_tensors, encode

_T5_LENGTH = 256


class StableDiffusion3Backbone(FlowTokenBackbone):
    """An SD3Transformer2DModel with two CLIP text encoders and, where the directory has it, T5."""

    model_class = SD3Transformer2DModel

    def encode_prompts(self, prompts: list[str], sizes: list[int] | None = None) -> Conditioning:
        """Return (K, T, E): CLIP states side by side, padded to T5's width, then T5's tokens (zeros without T5)."""

        def of_clip(number: str) -> dict[str, Tensor]:
            encoder = ClipEncoder(self.path, number, self.device, projected=True)
            return encode(encoder, prompts, sizes, clip_tensors(self.dtype))

        first, second = of_clip(""), of_clip("_2")
        joined = {name: torch.cat([first[name], second[name]], dim=-1) for name in first}
        clip, width = joined["states"], self._model.config.joint_attention_dim
        if (self.path / "text_encoder_3").is_dir():
            encoder = T5Encoder(self.path, "_3", _T5_LENGTH, self.device, self.dtype, masked=False)
            t5 = encode(encoder, prompts, sizes, lambda states, mask: {"states": states.to(self.dtype)})["states"]
        else:
            t5 = clip.new_zeros(len(clip), _T5_LENGTH, width)
        states = torch.cat([functional.pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
        tensors = {"encoder_hidden_states": states, "pooled_projections": joined["pooled"]}
        return Conditioning(tensors, joined["similarity"].cpu())

    def _denoise(self, noisy: Tensor, timestep: int, conditioning: dict[str, Tensor]) -> None:
        timesteps = torch.full((len(noisy),), timestep, device=noisy.device)
        self._model(noisy, timestep=timesteps, return_dict=False, **conditioning)

    def _image_map(self, output: Any) -> Tensor:
        return super()._image_map(output[1])  # a block returns the text's tokens and the image's
