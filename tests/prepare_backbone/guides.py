"""Small corpora of PNG files and trainings of seconds."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.prepare_backbone.training.architecture import Size

QUICK: dict[str, Any] = {"size": "nano", "image_size": 16, "batch_size": 4, "autoencoder_steps": 3, "denoiser_steps": 3}
"""prepare_backbone.training of a second."""

TINY = Size((8, 8, 8), (8, 8, 8, 16), 8, 2, 1e-3, 1e-3)
"""Models whose checkpoints take no time."""


def write_corpus(folder: Path, per_class: int = 3, classes: tuple[str, ...] = ("red_ball", "blue_box"), seed: int = 0):
    """Write random images of 20 pixels into class folders; return the folder."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            image = Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8))
            image.save(folder / name / f"{number}.png")
    return folder


def settings(corpus: Path, **training: Any) -> dict[str, Any]:
    """Return params.yaml's changes for a quick guide named "mine"."""
    return {
        "prepare_backbone.name": "mine",
        "prepare_backbone.source": "train",
        "prepare_backbone.corpus": str(corpus),
        "prepare_backbone.training": QUICK | training,
    }
