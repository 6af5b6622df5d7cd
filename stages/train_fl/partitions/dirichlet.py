"""The two partitions called Dirichlet: the field's common one, and the FedDifRC authors' size-balanced variant.

Both draw, per class, shares over clients. Drawing shares over classes per client (FedDyn, FedCR) is another partition:
its alpha means something else. On CIFAR-10 with 10 clients the authors' variant is the milder one at equal alpha, so
the two are named apart and accuracies must not be compared across them.
"""

import itertools
import logging
import math

import numpy as np

from pipeline.errors import PipelineError
from pipeline.progress import track

log = logging.getLogger(__name__)

_MAX_DRAWS = 10_000
_DRAWS_BETWEEN_LOOKS = 100
_HOPELESS = 0.01  # partitions to be expected of all draws to come


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
    wanted = f"each of {num_clients} clients has {min_samples} of {len(labels)} samples"
    remedy = "lower min_samples or train_fl.num_clients, or raise alpha"
    parts = _draw_until(np.arange(len(labels)), labels, num_clients, alpha, min_samples, rng, f"{wanted}: {remedy}")
    return [np.sort(part) for part in parts]


def dirichlet_balanced(
    labels: np.ndarray, num_clients: int, alpha: float, group_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """The partition of the FedDifRC authors' code: Dirichlet inside groups of clients, then a cut into equal sizes.

    The shuffled samples are shared out to groups of `group_size` clients; inside a group `dirichlet` is drawn until
    every client has half of a fair share; the parts, each ordered by class, are then laid end to end and cut again
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
        wanted = f"each of {size} clients has half of a fair share: lower group_size or raise alpha"
        line += _draw_until(pool, labels, int(size), alpha, int(0.5 * len(pool) / size), rng, wanted)
    return [np.sort(part) for part in np.array_split(np.concatenate(line), num_clients)]


def _draw_until(
    pool: np.ndarray,
    labels: np.ndarray,
    num_clients: int,
    alpha: float,
    min_samples: int,
    rng: np.random.Generator,
    wanted: str,
) -> list[np.ndarray]:
    """Draws the samples in `pool` to clients, again and again, until each has `min_samples`; parts are by class.

    Raises:
        PipelineError: no draw gives that, or none is to be expected; `wanted` says what, and what to change.
    """
    by_class = [pool[labels[pool] == label] for label in np.unique(labels[pool])]
    drawn = (_draw(by_class, num_clients, alpha, len(pool) / num_clients, rng) for _ in range(_MAX_DRAWS))
    shown = track(drawn, "partition", _MAX_DRAWS - _DRAWS_BETWEEN_LOOKS, "draw")  # shows nothing before it is asked
    with_enough: list[int] = []  # clients that have min_samples, by draw
    more = ""
    for parts in itertools.chain(itertools.islice(drawn, _DRAWS_BETWEEN_LOOKS), shown):
        with_enough.append(sum(len(part) >= min_samples for part in parts))
        if with_enough[-1] == num_clients:
            return parts
        draws = len(with_enough)
        if draws % _DRAWS_BETWEEN_LOOKS or draws == _MAX_DRAWS:
            continue
        if (_MAX_DRAWS - draws) * _chance(with_enough, num_clients) < _HOPELESS:
            more = f", and {_MAX_DRAWS} would hardly give one,"
            break
        if draws == _DRAWS_BETWEEN_LOOKS:
            log.info("partition: none of %d draws fits, drawing on, at most %d times", draws, _MAX_DRAWS)
    raise PipelineError(f"{len(with_enough)} draws with alpha {alpha} gave no partition{more} where {wanted}")


def _chance(with_enough: list[int], num_clients: int) -> float:
    """An upper estimate of the chance that one more draw gives all clients enough, from the draws so far.

    The number of clients with enough is taken for a sum of independent yes-or-no draws of unequal chances. With mean mu
    and variance s^2 such a sum reaches num_clients most often if some clients always have enough and the m others have
    it with equal chance r: r = s^2 / (num_clients - mu), m = (num_clients - mu) / (1 - r), and the chance is r^m. It is
    also at most (mu / num_clients)^num_clients. Clients share a fixed number of samples, so what one has another lacks,
    and the true chance is rather lower. Mean and variance are taken three standard errors above what was seen.
    """
    mean, variance, draws = float(np.mean(with_enough)), float(np.var(with_enough)), len(with_enough)
    mean += 3 * math.sqrt(variance / draws) + 3 / draws
    variance *= 1 + 3 * math.sqrt(2 / draws)
    lacking = num_clients - mean
    if lacking <= 0:
        return 1.0
    r = (variance + 3 / draws) / lacking  # 3 / draws: what was never seen may still happen so often
    by_variance = r ** (lacking / (1 - r)) if r < 1 else 1.0
    return min(by_variance, (mean / num_clients) ** num_clients)


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
