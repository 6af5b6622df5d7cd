"""How the training set is dealt to clients."""

import numpy as np

from pipeline.errors import PipelineError

_MAX_DRAWS = 10_000


def dirichlet(
    labels: np.ndarray, num_clients: int, alpha: float, min_samples: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Per-class Dirichlet over clients, the common algorithm (Yurochkin et al., ICML 2019; NIID-Bench).

    For each class a share per client is drawn from Dir(alpha, ..., alpha); clients that already hold N / num_clients
    samples or more get none of it; the shuffled samples of the class are cut at the cumulative shares. All is drawn
    again until every client has `min_samples`.

    Args:
        labels: int64 (N,).
        num_clients: number of parts.
        alpha: concentration > 0; small is heterogeneous.
        min_samples: the least that a client may have.
        rng: source of all draws.

    Returns:
        Per client an ascending int64 array of positions in `labels`; together they are a permutation of 0..N-1.

    Raises:
        PipelineError: no draw gives every client `min_samples`.
    """
    if num_clients * min_samples > len(labels):
        raise PipelineError(f"{len(labels)} samples cannot give each of {num_clients} clients {min_samples}")
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(_MAX_DRAWS):
        parts = _draw_dirichlet(by_class, num_clients, alpha, len(labels) / num_clients, rng)
        if min(map(len, parts)) >= min_samples:
            return [np.sort(part) for part in parts]
    raise PipelineError(
        f"{_MAX_DRAWS} draws of dirichlet(alpha={alpha}) gave none where each of {num_clients} clients has "
        f"{min_samples} of the {len(labels)} samples: lower min_samples or num_clients, or raise alpha"
    )


def _draw_dirichlet(
    by_class: list[np.ndarray], num_clients: int, alpha: float, fair_size: float, rng: np.random.Generator
) -> list[np.ndarray]:
    parts = [np.empty(0, np.int64) for _ in range(num_clients)]
    for members in by_class:
        shuffled = rng.permutation(members)
        share = rng.dirichlet(np.full(num_clients, alpha))
        share = share * [len(part) < fair_size for part in parts]
        if share.sum() == 0:  # alpha is so small that all of the class fell to clients who are full
            share = np.array([len(part) < fair_size for part in parts], float)
        cuts = (np.cumsum(share / share.sum())[:-1] * len(shuffled)).astype(int)
        parts = [np.concatenate([part, dealt]) for part, dealt in zip(parts, np.split(shuffled, cuts), strict=True)]
    return parts


def label_counts(parts: list[np.ndarray], labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Samples per client and class: int64 (num_clients, num_classes)."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])
