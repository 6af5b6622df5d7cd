"""Draw partition.svg: the samples of every client and class."""

from pathlib import Path

import numpy as np

from pipeline import plotting
from pipeline.io import atomic


def write(path: Path, counts: np.ndarray, class_names: list[str]) -> None:
    """Write an SVG file; equal counts give equal bytes.

    Args:
        path: The file.
        counts: int64 (num_clients, num_classes).
        class_names: One per class.
    """
    most = int(counts.max())
    atomic.write_text(path, plotting.clients_by_class(counts, class_names, f"largest dot: {most} samples", most))
