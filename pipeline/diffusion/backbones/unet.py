"""Stable Diffusion 1.x, 2.x and XL: a UNet read at its decoder's blocks (Rombach et al., CVPR 2022).

The paper's "layers 2-4" are the last three up blocks: 1, 2, 3 of Stable Diffusion 1 and 2 (1280, 640, 320 channels),
0, 1, 2 of XL. Blocks after the last one asked for become a stub that passes its input on. Cutting the list
`unet.up_blocks` short instead would be silently wrong where the latent side is not a multiple of 8, because diffusers
would then take the last kept block for the final one and skip its upsampling size.
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pipeline.diffusion.backbones.base import Backbone, Conditioning
from pipeline.diffusion.backbones.text import ClipEncoder, clip_tensors, encode


class UNetBackbone(Backbone):
    """A UNet2DConditionModel with one CLIP text encoder, or two as Stable Diffusion XL."""

    component = "unet"
    model_class = UNet2DConditionModel

    def encode_prompts(self, prompts: list[str], sizes: list[int] | None = None) -> Conditioning:
        """Return token states (K, T, E); XL joins its encoders' states and adds the second's pooled embedding."""

        def encoded(number: str) -> dict[str, Tensor]:
            encoder = ClipEncoder(self.path, number, self.device, projected=self._is_xl)
            return encode(encoder, prompts, sizes, clip_tensors(self.dtype))

        if not self._is_xl:
            only = encoded("")
            return Conditioning({"encoder_hidden_states": only["states"]}, only["similarity"].cpu())
        parts = [encoded(number) for number in ("", "_2")]
        states = torch.cat([part["states"] for part in parts], dim=-1)
        tensors = {"encoder_hidden_states": states, "text_embeds": parts[-1]["pooled"]}
        return Conditioning(tensors, parts[-1]["similarity"].cpu())

    @classmethod
    def _known_layers(cls, config: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
        """Return the up blocks; "auto" is the last three."""
        channels = config["block_out_channels"][::-1]
        known = {f"up_blocks.{block}": count for block, count in enumerate(channels)}
        return known, list(known)[-3:]

    @property
    def _is_xl(self) -> bool:
        return self._model.config.addition_embed_type == "text_time"

    def _denoise(self, noisy: Tensor, timestep: int, conditioning: dict[str, Tensor]) -> None:
        states, pooled = conditioning["encoder_hidden_states"], conditioning.get("text_embeds")
        step = torch.full((), timestep, dtype=torch.int64, device=noisy.device)  # diffusers would wait for the GPU
        added = {"text_embeds": pooled, "time_ids": self._time_ids(noisy)} if self._is_xl else None
        self._model(noisy, step, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)

    def _time_ids(self, noisy: Tensor) -> Tensor:
        """Return XL's micro-conditioning (B, 6): original size, crop corner, target size; nothing is cropped."""
        side = self._image_side(noisy)
        ids = noisy.new_full((1, 6), side)
        ids[:, 2:4] = 0
        return ids.expand(len(noisy), -1)

    def _drop_tail(self) -> None:
        last = max(int(layer.split(".")[1]) for layer in self.channels)
        for block in range(last + 1, len(self._model.up_blocks)):
            self._model.up_blocks[block] = _PassThrough(self._model.up_blocks[block])
        self._model.conv_norm_out = None
        self._model.conv_out = nn.Identity()


class _PassThrough(nn.Module):
    """Replaces an up block whose output nobody reads: takes its skip connections, returns its input."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.resnets = [None] * len(block.resnets)  # the UNet counts them to distribute its skip connections
        self.has_cross_attention = getattr(block, "has_cross_attention", False)

    def forward(self, hidden_states: Tensor, **unused: object) -> Tensor:
        return hidden_states
