"""Pictures that a model in training draws, one per class, in one PNG."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from pipeline import seeding
from pipeline.io import atomic

_CLASSES = 10  # that are drawn
_STEPS = 25
_GUIDANCE = 3.0


@torch.no_grad()
def draw(pipe: StableDiffusionPipeline, captions: Sequence[str], rows: int = 1) -> np.ndarray:
    """Draw images of up to ten captions, evenly chosen, each in a column: uint8 (rows * S, columns * S, 3).

    The first noise is the same every time, so that pictures of two moments can be compared.
    """
    chosen = [captions[position * len(captions) // _CLASSES] for position in range(_CLASSES)]
    chosen = list(dict.fromkeys(chosen))
    config, side = pipe.unet.config, pipe.unet.config.sample_size
    count = rows * len(chosen)
    noise = torch.randn(count, config.in_channels, side, side, generator=seeding.torch_generator(0, "guide", "samples"))
    made = pipe(
        chosen * rows, height=pipe.vae.config.sample_size, width=pipe.vae.config.sample_size,
        num_inference_steps=_STEPS, guidance_scale=_GUIDANCE, latents=noise.to(pipe.device), output_type="np",
    ).images  # fmt: skip
    pixels = np.nan_to_num(255 * made).round().astype(np.uint8)  # (rows * K, S, S, 3)
    grid = pixels.reshape(rows, len(chosen), *pixels.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in grid])


def write(path: Path, image: np.ndarray) -> None:
    """Write an image, uint8 (H, W, 3), as a PNG, enlarged so that it is at least 64 pixels high."""
    factor = max(1, math.ceil(64 / len(image)))
    stream = io.BytesIO()
    Image.fromarray(image.repeat(factor, 0).repeat(factor, 1)).save(stream, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(path, stream.getvalue(), sync=False)
