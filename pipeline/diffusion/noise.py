"""Per-image noise: one draw per image, shared by all prompts and timesteps."""

import numpy as np
import torch
from torch import Tensor

from pipeline import seeding


def draw(shape: tuple[int, ...], seed: int, index: np.ndarray) -> Tensor:
    """Draw standard normal noise for each image, from a generator of its own on the CPU.

    Args:
        shape: Shape of a latent, (C, h, w).
        seed: `extract_features.noise_seed`.
        index: int64 (n,), positions of the images in the data set. They key the draws, so that neither batch, order
            nor device changes them.

    Returns:
        float32 (n, C, h, w) on the CPU.
    """
    return torch.stack(
        [torch.randn(shape, generator=seeding.torch_generator(seed, "noise", int(sample))) for sample in index]
    )
