"""Hashes by which the same image is recognised in two data sets: the first 64 bits of a SHA-256.

- Of an image file's bytes: finds the same file at whatever size its images are prepared.
- Of an image's pixels as prepared, uint8 (H, W, 3): finds the same pixels from another file, or from a data set that
  has no image files, at the same size.

Neither finds an image that was encoded again with loss, cropped or edited.
"""

import hashlib

import numpy as np


def of_bytes(content: bytes | memoryview) -> int:
    """Return the hash of bytes, below 2^64."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def of_pixels(images: np.ndarray) -> np.ndarray:
    """Return the hash of each image, uint64 (N,), of uint8 (N, H, W, 3)."""
    return np.array([of_bytes(np.ascontiguousarray(image).data) for image in images], np.uint64)


def as_text(hashes: np.ndarray) -> list[str]:
    """Write hashes, uint64 (N,), as 16 hexadecimal digits each."""
    return [f"{value:016x}" for value in hashes.tolist()]


def from_text(texts: list[str]) -> np.ndarray:
    """Read what `as_text` wrote."""
    return np.array([int(text, 16) for text in texts], np.uint64)
