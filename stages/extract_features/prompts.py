"""Which prompts an image is shown with: its own class, and the classes it must not be taken for.

Text is encoded once per class, never per image. With few classes every class is a prompt, in class order; with many,
an image gets its own class and the K classes nearest to it by text embedding, the hardest negatives.
"""

from typing import Literal

import numpy as np


def class_prompts(template: str, class_names: list[str]) -> list[str]:
    """One prompt per class: `template` with {class_name} filled in."""
    return [template.replace("{class_name}", name) for name in class_names]


def prompts_per_image(negatives: Literal["all"] | int, num_classes: int) -> int:
    """P: all classes, or one positive and the negatives asked for."""
    return num_classes if negatives == "all" else min(negatives + 1, num_classes)


def assign_prompts(labels: np.ndarray, negatives: Literal["all"] | int, text_embeddings: np.ndarray) -> np.ndarray:
    """The class of each prompt of each image; the image's own class is always among them.

    Args:
        labels: int64 (n,).
        negatives: "all" or K >= 1.
        text_embeddings: float (num_classes, E), one pooled embedding per class.

    Returns:
        int16 (n, P). Class order if every class is a prompt; else the positive first, then the K nearest negatives,
        nearest first, ties to the smaller label.
    """
    num_classes = len(text_embeddings)
    count = prompts_per_image(negatives, num_classes)
    if count == num_classes:
        return np.tile(np.arange(num_classes, dtype=np.int16), (len(labels), 1))
    unit = text_embeddings / np.linalg.norm(text_embeddings, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, np.inf)  # a class is nearest to itself
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return nearest.astype(np.int16)[labels]
