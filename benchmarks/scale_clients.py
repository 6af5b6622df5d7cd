"""For scale.py: partitions, their statistics and pictures, and the report, as the number of clients grows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from stages.train_fl.partitions import dirichlet, heterogeneity, picture

SAMPLES, CLASSES = 200_000, 200
MOST_PICTURE, MOST_PAGE = 300_000, 5_000_000  # bytes

Action = Callable[[], object]


def partition(folder: Path, clients: int) -> Action:
    """Draw a Dirichlet partition of 200,000 samples of 200 classes."""
    labels, rng = np.arange(SAMPLES) % CLASSES, np.random.default_rng(0)
    return lambda: dirichlet(labels, clients, 0.5, 0, rng)


def _counts(clients: int, classes: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 50, (clients, classes)) * (rng.random((clients, classes)) < 0.3) + np.eye(
        clients, classes, dtype=int
    )


def statistics(folder: Path, clients: int) -> Action:
    """Compute the statistics of a partition of ten classes; all pairs of clients are compared."""
    counts = _counts(clients, 10)
    return lambda: heterogeneity(counts)


def pictures(folder: Path, clients: int) -> Action:
    """Draw a partition of 1,000 classes."""
    counts, names = _counts(clients, 1_000), [f"class {label}" for label in range(1_000)]
    picture.write(folder / "first.svg", counts[:2], names)  # loads matplotlib

    def action() -> None:
        picture.write(folder / "partition.svg", counts, names)
        assert (folder / "partition.svg").stat().st_size < MOST_PICTURE

    return action


def report(folder: Path, clients: int) -> Action:
    """Write the report of two methods, one partition and one seed."""
    from tests.report import grid  # needs the repository's folder on the path

    (folder / "first").mkdir()
    grid.write_grid(folder / "first", ["fedavg"], ["dir005"], [0], 2)  # loads the libraries

    def action() -> None:
        grid.write_grid(folder, ["fedavg", "fedprox"], ["dir005"], [0], 2, clients)
        assert (folder / "report" / "index.html").stat().st_size < MOST_PAGE

    return action
