"""Balance clients' classes with generated images, for any method: the synthetic-data baseline.

A client's missing samples of a class are drawn, without repetition, from the images that the synthesize stage made of
it; if those run out, the class stays smaller. Generated images have no cached representations, so methods with
guidance cannot use them.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.data.datasets import PreparedDataset
from pipeline.errors import PipelineError

Rule = Literal["mean", "largest"]


def open_checked(path: Path, dataset: PreparedDataset) -> PreparedDataset:
    """Open the generated images of `dataset`'s classes.

    Raises:
        PipelineError: there are none, or they are of other classes or another size than the data set's.
    """
    if not (path / "train.h5").exists():
        raise PipelineError(
            f"{path} holds no images: set synthesize.images_per_class above 0 and run `pipeline synthesize`, or set "
            "train_fl.balance_with_synthetic to none"
        )
    synthetic = PreparedDataset(path)
    if (synthetic.class_names, synthetic.image_size) != (dataset.class_names, dataset.image_size):
        raise PipelineError(f"{path} was made for other classes or another image size: run `pipeline synthesize`")
    return synthetic


def top_up(counts: np.ndarray, labels: np.ndarray, rule: Rule, rng: np.random.Generator) -> np.ndarray:
    """Choose the generated images that a client gets.

    Args:
        counts: int64 (num_classes,), the client's own samples.
        labels: int64 (M,), of the generated images.
        rule: every class is filled up to the client's mean class size (rounded up) or to its largest.
        rng: decides which images of a class.

    Returns:
        Ascending int64 positions in `labels`; none for a client without samples.
    """
    target = -(-counts.sum() // len(counts)) if rule == "mean" else counts.max()
    drawn = [
        rng.permutation(np.flatnonzero(labels == label))[: max(0, target - count)] for label, count in enumerate(counts)
    ]
    return np.sort(np.concatenate(drawn))
