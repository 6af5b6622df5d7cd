"""Optional: a frozen CLIP image embedding added to every token of an image's prompts.

The paper conditions on c_i = h_k(x_i), the client's own feature of the image, which changes every round and so cannot
be cached. This is its cacheable form: h is CLIP's image encoder (Radford et al., ICML 2021), frozen. It must embed
into as many numbers as the backbone's prompt embeddings have: ViT-L/14 for Stable Diffusion 1, ViT-H/14 for 2.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection

from pipeline.diffusion import frozen_model
from pipeline.diffusion.backbones.base import load_part
from pipeline.settings.config import Config

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own pixel statistics
_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder:
    """CLIP's image encoder, float32."""

    def __init__(self, path: Path, device: str) -> None:
        """Loads a CLIPVisionModelWithProjection directory.

        Raises:
            PipelineError: there is none.
        """
        self._model = load_part(CLIPVisionModelWithProjection, path, device).to(device).eval().requires_grad_(False)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, E) on the device."""
        pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
        side = self._model.config.image_size
        pixels = functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        return self._model((pixels - mean) / std).image_embeds


def load(config: Config, device: str) -> ImageEncoder | None:
    """The image encoder that params.yaml names; None without image conditioning.

    Raises:
        PipelineError: there is none where it says.
    """
    path = frozen_model.image_encoder_dir(config)
    return ImageEncoder(path, device) if path else None
