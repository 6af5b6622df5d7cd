"""FLUX.1: a joint text and image transformer trained by flow matching (Black Forest Labs, 2024).

The latents' 2x2 patches are packed into tokens outside of the transformer. The first blocks have streams of their own
for text and image ("transformer_blocks"), the others one stream ("single_transformer_blocks"); a block's image tokens
become its map. FLUX.1-dev also takes the strength of the guidance that it was distilled for; it gets its pipeline's
default, 3.5. Prompts are padded to the number of T5 tokens that the model was trained with, since nothing masks them.
"""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from pipeline.diffusion.backbones.base import Conditioning, FlowTokenBackbone
from pipeline.diffusion.backbones.text import ClipEncoder, T5Encoder, clip_tensors, encode

_GUIDANCE = 3.5
_T5_LENGTHS = {True: 512, False: 256}  # with guidance (dev) and without (schnell)


class FluxBackbone(FlowTokenBackbone):
    """A FluxTransformer2DModel with CLIP, whose pooled embedding it uses, and T5."""

    model_class = FluxTransformer2DModel

    @classmethod
    def patch_size(cls, config: dict[str, Any]) -> int:
        """Return 2: packing is not part of the configuration."""
        return 2

    def encode_prompts(self, prompts: list[str], sizes: list[int] | None = None) -> Conditioning:
        """Return T5's token states (K, T, E) and CLIP's pooled embedding, by which prompts are compared."""
        clip = encode(
            ClipEncoder(self.path, "", self.device, projected=False), prompts, sizes, clip_tensors(self.dtype)
        )
        length = _T5_LENGTHS[self._model.config.guidance_embeds]
        encoder = T5Encoder(self.path, "_2", length, self.device, self.dtype, masked=False)
        t5 = encode(encoder, prompts, sizes, lambda states, mask: {"states": states.to(self.dtype)})
        tensors = {"encoder_hidden_states": t5["states"], "pooled_projections": clip["pooled"]}
        return Conditioning(tensors, clip["similarity"].cpu())

    @classmethod
    def _blocks(cls, config: dict[str, Any]) -> list[str]:
        first = [f"transformer_blocks.{block}" for block in range(config["num_layers"])]
        return first + [f"single_transformer_blocks.{block}" for block in range(config["num_single_layers"])]

    def _denoise(self, noisy: Tensor, timestep: int, conditioning: dict[str, Tensor]) -> None:
        batch, channels, height, width = noisy.shape
        height, width = height // 2, width // 2
        patches = noisy.view(batch, channels, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5)
        places = torch.zeros(height, width, 3, dtype=noisy.dtype, device=noisy.device)
        places[..., 1] += torch.arange(height, device=noisy.device)[:, None]
        places[..., 2] += torch.arange(width, device=noisy.device)
        guidance = torch.full((batch,), _GUIDANCE, device=noisy.device) if self._model.config.guidance_embeds else None
        self._model(
            patches.reshape(batch, height * width, channels * 4),
            timestep=torch.full((batch,), timestep, dtype=noisy.dtype, device=noisy.device) / 1000,
            guidance=guidance,
            img_ids=places.view(-1, 3),
            txt_ids=places.new_zeros(conditioning["encoder_hidden_states"].shape[1], 3),
            return_dict=False,
            **conditioning,
        )

    def _image_map(self, output: Any) -> Tensor:
        return super()._image_map(output[1])  # a block returns the text's tokens and the image's

    def _drop_tail(self) -> None:
        kind, last = max(self.channels, key=self._blocks(self._model.config).index).split(".")
        if kind == "transformer_blocks":
            self._model.single_transformer_blocks = nn.ModuleList()
        setattr(self._model, kind, getattr(self._model, kind)[: int(last) + 1])
