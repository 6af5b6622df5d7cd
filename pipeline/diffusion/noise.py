"""The noise that an image is seen with: one draw an image, the same for every prompt and timestep."""

import numpy as np
import torch
from torch import Tensor

from pipeline import seeding


def draw(shape: tuple[int, ...], seed: int, index: np.ndarray) -> Tensor:
    """Standard normal noise of each image, from a generator of its own on the CPU.

    Args:
        shape: of a latent, (C, h, w).
        seed: the feature set's noise_seed.
        index: int64 (n,), the images' positions in the data set, which key the draws: neither batch, order nor
            device changes them.

    Returns:
        float32 (n, C, h, w) on the CPU.
    """
    return torch.stack(
        [torch.randn(shape, generator=seeding.torch_generator(seed, "noise", int(sample))) for sample in index]
    )
