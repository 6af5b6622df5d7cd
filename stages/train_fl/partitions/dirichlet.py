"""The two partitions called Dirichlet: the field's common one, and the FedDifRC authors' size-balanced variant.

Both draw, per class, shares over clients. Drawing shares over classes per client (FedDyn, FedCR) is another partition:
its alpha means something else. On CIFAR-10 with 10 clients the authors' variant is the milder one at equal alpha, so
the two are named apart and accuracies must not be compared across them.
"""

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
        raise PipelineError(
            f"{len(labels)} samples cannot give each of {num_clients} clients {min_samples}: lower min_samples or "
            "train_fl.num_clients, or raise prepare_data.train_subset"
        )
    parts = _draw_until(np.arange(len(labels)), labels, num_clients, alpha, min_samples, rng)
    if parts is None:
        raise PipelineError(
            f"{_MAX_DRAWS} draws with alpha {alpha} gave none where each of {num_clients} clients has {min_samples} of "
            f"{len(labels)} samples: lower min_samples or train_fl.num_clients, or raise alpha"
        )
    return [np.sort(part) for part in parts]


def dirichlet_balanced(
    labels: np.ndarray, num_clients: int, alpha: float, group_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """The partition of the FedDifRC authors' code: Dirichlet inside groups of clients, then a cut into equal sizes.

    The shuffled samples are shared out to groups of `group_size` clients; inside a group `dirichlet` is drawn until
    every client has half of a fair share; the parts, each ordered by class, are then laid end to end and cut anew
    into `num_clients` chunks of equal size, so that a client's border classes move into its neighbour.

    Args:
        labels: int64 (N,).
        num_clients: number of parts.
        alpha: concentration > 0; small is heterogeneous.
        group_size: clients per group, 5 in the authors' code; the last group may be smaller.
        rng: source of all draws.

    Returns:
        Per client an ascending int64 array; sizes differ by one at most; together a permutation of 0..N-1.

    Raises:
        PipelineError: no draw gives every client of a group half of a fair share.
    """
    ends = np.array([*range(group_size, num_clients, group_size), num_clients])  # clients up to each group's last
    pools = np.split(rng.permutation(len(labels)), ends[:-1] * len(labels) // num_clients)
    line = []
    for pool, size in zip(pools, np.diff(ends, prepend=0), strict=True):
        parts = _draw_until(pool, labels, int(size), alpha, int(0.5 * len(pool) / size), rng)
        if parts is None:
            raise PipelineError(
                f"{_MAX_DRAWS} draws with alpha {alpha} gave none where each of {size} clients has half of a fair "
                "share: lower group_size or raise alpha"
            )
        line += parts
    return [np.sort(part) for part in np.array_split(np.concatenate(line), num_clients)]


def _draw_until(
    pool: np.ndarray, labels: np.ndarray, num_clients: int, alpha: float, min_samples: int, rng: np.random.Generator
) -> list[np.ndarray] | None:
    """Draws the samples in `pool` to clients, again and again, until each has `min_samples`; parts are by class."""
    by_class = [pool[labels[pool] == label] for label in np.unique(labels[pool])]
    for _ in range(_MAX_DRAWS):
        parts = _draw(by_class, num_clients, alpha, len(pool) / num_clients, rng)
        if min(map(len, parts)) >= min_samples:
            return parts
    return None


def _draw(
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
