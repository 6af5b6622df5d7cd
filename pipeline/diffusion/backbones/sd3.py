"""Stable Diffusion 3: a joint text and image transformer trained by flow matching (Esser et al., ICML 2024).

Noising is a straight line, not a diffusion: x_sigma = (1 - sigma) * x_0 + sigma * noise, and the model is told
1000 * sigma. A timestep t therefore means sigma = t / 1000: 300 is three parts noise to seven parts image, which is
less noise than timestep 300 is under Stable Diffusion 1's schedule. The sampler's `shift` chooses which sigmas a
sampler visits and does not enter here.
"""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional

from pipeline.diffusion.backbones.base import Conditioning, TokenBackbone
from pipeline.diffusion.backbones.text import clip_states, t5_states

_T5_LENGTH = 256


class StableDiffusion3Backbone(TokenBackbone):
    """An SD3Transformer2DModel with two CLIP text encoders and, where the directory has it, T5."""

    model_class = SD3Transformer2DModel

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """CLIP states side by side, padded to T5's width, then T5's tokens (zeros without T5): (K, T, E)."""
        first, second = (clip_states(self.path, part, prompts, self.device, projected=True) for part in ("", "_2"))
        clip = torch.cat([first[0], second[0]], dim=-1)
        pooled = torch.cat([first[1], second[1]], dim=-1)
        width = self._model.config.joint_attention_dim
        if (self.path / "text_encoder_3").is_dir():
            t5, _ = t5_states(self.path, "_3", prompts, _T5_LENGTH, self.device, self.dtype, masked=False)
        else:
            t5 = clip.new_zeros(len(prompts), _T5_LENGTH, width)
        states = torch.cat([functional.pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
        tensors = {"encoder_hidden_states": states.to(self.dtype), "pooled_projections": pooled.to(self.dtype)}
        return Conditioning(tensors, pooled.float().cpu())

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """(1 - sigma) * latents + sigma * noise, sigma = timestep / 1000."""
        sigma = timestep / self._num_timesteps
        return (1 - sigma) * latents + sigma * noise

    @property
    def _num_timesteps(self) -> int:
        return FlowMatchEulerDiscreteScheduler.load_config(self.path / "scheduler")["num_train_timesteps"]

    def _denoise(self, noisy: Tensor, timestep: int, conditioning: dict[str, Tensor]) -> None:
        timesteps = torch.full((len(noisy),), timestep, device=noisy.device)
        self._model(noisy, timestep=timesteps, return_dict=False, **conditioning)

    def _image_map(self, output: Any) -> Tensor:
        return super()._image_map(output[1])  # a block returns the text's tokens and the image's
