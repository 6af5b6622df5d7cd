"""Per-image noise: one draw per image, shared by all prompts and timesteps."""

import numpy as np
import torch
from torch import Tensor

from pipeline import seeding


def draw(shape: tuple[int, ...], seed: int, index: np.ndarray) -> Tensor:
    """Draw standard normal noise, float32 (n, C, h, w) on the CPU, with one generator per image.

    The images' positions in the data set, int64 (n,), key the draws: neither batch, order nor device changes them.
    """
    generators = (seeding.torch_generator(seed, "noise", int(image)) for image in index)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])
