"""Random augmentation of batches of training images on the device, using random numbers drawn ahead on the CPU.

"crop" shifts the zero-padded image by up to an eighth of its side, as is usual on CIFAR; "crop-flip" also mirrors half
of the images. "views" is for self-supervised learning (Chen et al., SimCLR, ICML 2020): a crop of a fifth to all of the
area resized to the image's size, a mirror image, and changes of brightness, contrast and saturation.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Augmentation = Literal["none", "crop", "crop-flip", "views"]


def to_model_range(images: Tensor) -> Tensor:
    """Convert uint8 0..255 to float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def draw(n: int, size: int, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Draw the random numbers of one view of each of n images of height `size`: float (n, numbers per image)."""
    if augmentation == "views":  # crop and mirror, then colour
        return torch.cat([torch.rand((4, n), generator=generator), torch.rand((3, n), generator=generator)]).T
    if augmentation == "none":
        return torch.empty(n, 0)
    shift = torch.randint(2 * (size // 8) + 1, (2, n), generator=generator).float()
    mirror = torch.rand((1, n), generator=generator) if augmentation == "crop-flip" else torch.ones((1, n))
    return torch.cat([shift, mirror]).T


def augment(images: Tensor, augmentation: Augmentation, drawn: Tensor) -> Tensor:
    """Make the view of each image that `draw` drew: uint8 (n, 3, H, W) -> float32 (n, 3, H, W) in [-1, 1]."""
    if augmentation == "views":
        return _colour(_resized_crop(to_model_range(images), drawn[:, :4].T), drawn[:, 4:].T)
    if augmentation != "none":
        images = _shift(images, drawn)
    return to_model_range(images)


def _shift(images: Tensor, drawn: Tensor) -> Tensor:
    n, _, height, width = images.shape
    padded = functional.pad(images, (height // 8,) * 4)
    top, left, mirror = drawn.T[:, :, None, None]  # each (n, 1, 1)
    rows = top.long() + torch.arange(height, device=images.device)[:, None]  # (n, H, 1)
    columns = left.long() + torch.arange(width, device=images.device)  # (n, 1, W)
    columns = torch.where(mirror < 0.5, columns.flip(2), columns)
    sample = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows, columns].permute(0, 3, 1, 2)  # (n, 3, H, W)


def _resized_crop(images: Tensor, draws: Tensor) -> Tensor:
    """Resize a square of 20 to 100 % of the area bilinearly to full size, mirrored half of the time; draws (4, n)."""
    side = (0.2 + 0.8 * draws[0]).sqrt()  # of the full side, 2
    centre_x, centre_y = (2 * draws[1] - 1) * (1 - side), (2 * draws[2] - 1) * (1 - side)
    mirrored = torch.where(draws[3] < 0.5, -side, side)
    zero = torch.zeros_like(side)
    affine = torch.stack([mirrored, zero, centre_x, zero, side, centre_y], 1).view(-1, 2, 3)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _colour(images: Tensor, draws: Tensor) -> Tensor:
    """Change brightness, contrast and saturation, each by a factor of 0.6 to 1.4; draws (3, n)."""
    draws = 0.6 + 0.8 * draws[..., None, None, None]
    unit = (images + 1) / 2 * draws[0]
    mean = unit.mean((1, 2, 3), keepdim=True)
    unit = mean + (unit - mean) * draws[1]
    grey = unit.mean(1, keepdim=True)
    unit = grey + (unit - grey) * draws[2]
    return unit.clamp(0, 1) * 2 - 1
