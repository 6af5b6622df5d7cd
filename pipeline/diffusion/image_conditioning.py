"""Optional image conditioning: add a frozen CLIP image embedding to every token of an image's prompts.

The paper conditions on c_i = h_k(x_i), the client's own feature of the image, which changes every round and so cannot
be cached. Here h is CLIP's image encoder (Radford et al., ICML 2021, https://arxiv.org/abs/2103.00020), frozen. Its
embeddings must be as wide as the backbone's prompt embeddings: ViT-L/14 for Stable Diffusion 1, ViT-H/14 for 2.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection

from pipeline.diffusion.backbones.base import load_part

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # mean and standard deviation of CLIP's training pixels
_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder:
    """CLIP's image encoder, computing in float32."""

    def __init__(self, path: Path, device: str) -> None:
        """Load a CLIPVisionModelWithProjection from its folder; see `load_part`."""
        self._model = load_part(CLIPVisionModelWithProjection, path, device).to(device).eval().requires_grad_(False)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Tensor:
        """Embed images uint8 (B, H, W, 3) as float32 (B, E), on the device."""
        pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
        side = self._model.config.image_size
        pixels = functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        return self._model((pixels - mean) / std).image_embeds
