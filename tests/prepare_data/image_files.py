"""Small image files whose content is known."""

from pathlib import Path

import numpy as np
from PIL import Image


def save_plain(path: Path, colour, size=(8, 8)) -> None:
    """An image file of one colour; PNG keeps it exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path)


def colours(images: np.ndarray) -> list[tuple[int, ...]]:
    """The colour in the middle of each image, uint8 (N, H, W, 3)."""
    return [tuple(int(value) for value in image[image.shape[0] // 2, image.shape[1] // 2]) for image in images]
