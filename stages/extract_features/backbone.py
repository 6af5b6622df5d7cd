"""The frozen Stable Diffusion model as a feature extractor.

Images are encoded by the VAE (the posterior's mean: deterministic), prompts by the text encoder, and the noised
latents go through the UNet once, whose decoder blocks are read by forward hooks (Tang et al., DIFT, NeurIPS 2023).
Nothing past the last block asked for is computed: the later up blocks become a stub that passes its input on.
Cutting the list `unet.up_blocks` short instead would be silently wrong where the latent side is not a multiple of 8,
because diffusers would then take the last kept block for the final one and skip its upsampling size.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from pipeline.errors import PipelineError


class StableDiffusionBackbone:
    """UNet, VAE, text encoder and noise schedule of one diffusers pipeline directory, frozen."""

    def __init__(self, path: Path, up_block_indices: list[int], device: str, dtype: torch.dtype) -> None:
        """Loads the model; the UNet computes in `dtype`, the VAE and the text encoder in float32.

        Args:
            path: a diffusers pipeline directory with safetensors weights.
            up_block_indices: decoder blocks to read, counted from 0.
            device: torch device.
            dtype: float32, bfloat16 or float16.

        Raises:
            PipelineError: a part cannot be loaded, or the UNet has no such up block.
        """
        self.device, self.dtype = device, dtype
        try:
            self._unet = UNet2DConditionModel.from_pretrained(path / "unet", use_safetensors=True)
            self._vae = AutoencoderKL.from_pretrained(path / "vae", use_safetensors=True)
            self._text_encoder = CLIPTextModel.from_pretrained(path / "text_encoder", use_safetensors=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
            self._scheduler = DDIMScheduler.from_pretrained(path / "scheduler")
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise PipelineError(f"{path} cannot be loaded as a Stable Diffusion model ({reason})") from None
        self.channels = decoder_channels(path, up_block_indices)
        """Layer name -> number of channels, in the order asked for."""
        self._captured: dict[str, torch.Tensor] = {}
        for index in up_block_indices:
            self._unet.up_blocks[index].register_forward_hook(self._capture(f"up_blocks.{index}"))
        _stub_tail(self._unet, max(up_block_indices))
        self._unet.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        self._vae.to(device, torch.float32).eval().requires_grad_(False)
        self._text_encoder.to(device, torch.float32).eval().requires_grad_(False)

    @torch.inference_mode()
    def encode_images(self, images: np.ndarray, image_size: int) -> torch.Tensor:
        """VAE latents, the posterior's mean times the scaling factor.

        Args:
            images: uint8 (B, H, W, 3).
            image_size: images are resized to this square, bicubically, before encoding.

        Returns:
            float32 (B, C, h, w) on the device.
        """
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
        if pixels.shape[-2:] != (image_size, image_size):
            pixels = functional.interpolate(pixels, (image_size, image_size), mode="bicubic", antialias=True)
            pixels = pixels.clamp(-1, 1)
        return self._vae.encode(pixels).latent_dist.mean * self._vae.config.scaling_factor

    @torch.inference_mode()
    def encode_prompts(self, prompts: list[str]) -> tuple[torch.Tensor, np.ndarray]:
        """Text encoder states, padded to the tokenizer's length T, and one pooled embedding per prompt.

        Returns:
            The states, `dtype` (len(prompts), T, E) on the device, and the embeddings, float32 (len(prompts), E).
        """
        length = self._tokenizer.model_max_length
        tokens = self._tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        encoded = self._text_encoder(tokens.to(self.device))
        return encoded.last_hidden_state.to(self.dtype), encoded.pooler_output.float().cpu().numpy()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """sqrt(alpha_bar) * latents + sqrt(1 - alpha_bar) * noise, all (B, C, h, w) float32."""
        return self._scheduler.add_noise(latents, noise, torch.tensor([timestep], device=latents.device))

    @torch.inference_mode()
    def features(self, noisy: torch.Tensor, timestep: int, prompt_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """One UNet pass.

        Args:
            noisy: float32 (B, C, h, w), noised latents.
            timestep: the timestep they were noised to.
            prompt_embeds: (B, T, E).

        Returns:
            Layer name -> float32 (B, C_l, h_l, w_l).
        """
        noisy = noisy.to(self.dtype, memory_format=torch.channels_last)
        self._unet(noisy, timestep, encoder_hidden_states=prompt_embeds, return_dict=False)
        captured, self._captured = self._captured, {}
        return {layer: captured[layer].float() for layer in self.channels}

    def _capture(self, layer: str):
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            self._captured[layer] = output

        return hook


def decoder_channels(path: Path, up_block_indices: list[int]) -> dict[str, int]:
    """Layer name -> number of channels of the up blocks asked for, from the model's configuration alone.

    Raises:
        PipelineError: `path` holds no such UNet, or it has no such up block.
    """
    try:
        channels = UNet2DConditionModel.load_config(path / "unet")["block_out_channels"][::-1]
    except (OSError, ValueError, KeyError) as error:
        raise PipelineError(f"{path}/unet is not a UNet2DConditionModel ({error})") from None
    if max(up_block_indices) >= len(channels):
        raise PipelineError(
            f"extract_features.up_block_indices = {up_block_indices}: {path.name} has up blocks "
            f"0 to {len(channels) - 1}"
        )
    return {f"up_blocks.{index}": channels[index] for index in up_block_indices}


class _PassThrough(nn.Module):
    """Stands in for an up block whose output nobody reads: takes its skip connections, returns its input."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.resnets = [None] * len(block.resnets)  # the UNet counts them to deal out its skip connections
        self.has_cross_attention = getattr(block, "has_cross_attention", False)

    def forward(self, hidden_states: torch.Tensor, **unused: object) -> torch.Tensor:
        return hidden_states


def _stub_tail(unet: UNet2DConditionModel, last_index: int) -> None:
    """Replaces all that comes after up block `last_index`; bit-exact for the blocks up to it."""
    for index in range(last_index + 1, len(unet.up_blocks)):
        unet.up_blocks[index] = _PassThrough(unet.up_blocks[index])
    unet.conv_norm_out = None
    unet.conv_out = nn.Identity()
