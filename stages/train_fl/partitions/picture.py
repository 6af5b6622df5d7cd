"""A heat map of clients x classes; matplotlib is imported only when one is drawn."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline import plotting
from pipeline.io import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_NUMBERED_CELLS = 400


def write(path: Path, counts: np.ndarray, class_names: list[str]) -> None:
    """Write an SVG heat map of samples, int64 (num_clients, num_classes); equal counts give equal bytes."""
    if counts.size <= _MAX_NUMBERED_CELLS:
        text = _drawn(counts.shape, np.ascontiguousarray(counts, np.int64).tobytes(), tuple(class_names))
    else:
        text = _heat_map(counts, class_names)
    atomic.write_text(path, text)


@functools.lru_cache(16)
def _drawn(shape: tuple[int, int], counts: bytes, class_names: tuple[str, ...]) -> str:
    """Draw a small picture once per process: methods that are compared in a loop share their partitions."""
    return _heat_map(np.frombuffer(counts, np.int64).reshape(shape), class_names)


@plotting.svg
def _heat_map(counts: np.ndarray, class_names: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure

    num_clients, num_classes = counts.shape
    figure = Figure(figsize=(2 + 0.45 * min(num_classes, 40), 1.6 + 0.3 * min(num_clients, 40)))
    axes = figure.add_subplot()
    plotting.heat_map(axes, counts, "samples")
    axes.set(xlabel="class", ylabel="client", yticks=_ticks(num_clients), xticks=_ticks(num_classes))
    axes.set_xticklabels([class_names[k] for k in _ticks(num_classes)], rotation=40, ha="right")
    if counts.size <= _MAX_NUMBERED_CELLS:
        for (client, label), count in np.ndenumerate(counts):
            colour = "white" if count > counts.max() / 2 else "black"
            axes.text(label, client, str(count), ha="center", va="center", fontsize=7, color=colour)
    return figure


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, count // 40)))
