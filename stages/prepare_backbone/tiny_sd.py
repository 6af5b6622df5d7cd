"""tiny-sd: a guide that is small enough to ship, trained on the rendered digits of `rendered_digits.py`."""

import contextlib
from pathlib import Path

import numpy as np

from pipeline import seeding
from pipeline.progress import track
from pipeline.settings.params import GuideTraining
from stages.prepare_backbone import rendered_digits
from stages.prepare_backbone.training.corpus import Corpus
from stages.prepare_backbone.training.run import trained as train_guide
from stages.prepare_backbone.training.trainer import Machine, Trainer

RECIPE = GuideTraining.model_validate(
    {
        "size": "nano", "image_size": rendered_digits.IMAGE_SIZE, "batch_size": 64, "autoencoder_steps": 1000,
        "denoiser_steps": 4000,
    }
)  # fmt: skip

_NUM_IMAGES = 20_000


def trained(
    machine: Machine, state_dir: Path, pictures: Path, recipe: GuideTraining = RECIPE, num_images: int = _NUM_IMAGES
) -> contextlib.AbstractContextManager[Trainer]:
    """Train tiny-sd, or resume: see `training.run.trained`. It takes about 40 minutes on two CPU cores."""
    return train_guide(corpus(recipe.seed, num_images), recipe, machine, state_dir, pictures)


def corpus(seed: int, num_images: int) -> Corpus:
    """Render the images, which fit the caption "a photo of a {class_name}"."""
    rendered = rendered_digits.render_digits(num_images, seeding.numpy_generator(seed, "tiny-sd", "corpus"))
    pairs = list(track(rendered, "render corpus", num_images))
    images = np.stack([image for image, _ in pairs])
    labels = np.array([digit for _, digit in pairs], np.int64)
    return Corpus(images, labels, rendered_digits.CLASS_NAMES, np.empty(0, np.uint64))
