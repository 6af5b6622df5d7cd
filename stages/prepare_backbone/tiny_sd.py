"""tiny-sd: a guide that is small enough to ship, trained on the rendered digits of `rendered_digits.py`.

It takes about 40 minutes on two CPU cores.
"""

import numpy as np

from pipeline import seeding
from pipeline.progress import track
from pipeline.settings.params import GuideTraining
from stages.prepare_backbone import rendered_digits
from stages.prepare_backbone.training.corpus import Corpus

RECIPE: GuideTraining = GuideTraining.model_validate(
    {
        "size": "nano", "image_size": rendered_digits.IMAGE_SIZE, "batch_size": 64, "autoencoder_steps": 1000,
        "denoiser_steps": 4000,
    }
)  # fmt: skip


def images(num_images: int = 20_000) -> Corpus:
    """Render the images to train on, which fit the caption "a photo of a {class_name}"."""
    rendered = rendered_digits.render_digits(num_images, seeding.numpy_generator(RECIPE.seed, "tiny-sd", "corpus"))
    pairs = list(track(rendered, "render corpus", num_images))
    pixels = np.stack([image for image, _ in pairs])
    labels = np.array([digit for _, digit in pairs], np.int64)
    return Corpus(pixels, labels, rendered_digits.CLASS_NAMES, np.empty(0, np.uint64))
