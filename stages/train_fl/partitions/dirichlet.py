"""The two partitions called Dirichlet: the field's common one, and the FedDifRC authors' size-balanced variant.

Both draw, per class, shares over clients. Drawing shares over classes per client (FedDyn, FedCR) is another partition:
its alpha means something else. On CIFAR-10 with 10 clients the authors' variant is the milder one at equal alpha, so
the two are named apart and accuracies must not be compared across them.
"""

import logging
import math
import time
from collections.abc import Iterator

import numpy as np

from pipeline.errors import ConfigError
from pipeline.progress import track

log = logging.getLogger(__name__)

_MAX_DRAWS = 10_000
_MAX_SHARES = 2 * 10**9  # of a class and a client, in all draws: some minutes
_FIRST_CHECKS, _DRAWS_PER_CHECK = (10, 30), 100
_HOPELESS = 0.01  # expected number of partitions from all remaining draws
_SILENT_SECONDS = 2.0


def dirichlet(
    labels: np.ndarray, num_clients: int, alpha: float, min_samples: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Draw per-class Dirichlet shares over clients, the common algorithm (Yurochkin et al., ICML 2019; NIID-Bench).

    For each class a share per client is drawn from Dir(alpha, ..., alpha); clients that already hold N / num_clients
    samples or more get none of it; the shuffled samples of the class are cut at the cumulative shares. All is drawn
    again until every client has `min_samples`. The concentration `alpha` is above 0; small is heterogeneous. Every
    sample goes to a client.
    """
    if num_clients * min_samples > len(labels):
        raise ConfigError(
            f"{len(labels)} samples cannot give each of {num_clients} clients {min_samples}. Lower min_samples or "
            "train_fl.num_clients, or raise prepare_data.train_subset."
        )
    wanted = f"each of {num_clients} clients {min_samples} of {len(labels)} samples"
    remedy = "Lower min_samples or train_fl.num_clients, or raise alpha."
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    parts = _draw_until(by_class, num_clients, alpha, min_samples, rng, wanted, remedy)
    return [np.sort(part) for part in parts]


def dirichlet_balanced(
    labels: np.ndarray, num_clients: int, alpha: float, group_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Partition as the FedDifRC authors' code: Dirichlet inside groups of clients, then a cut into equal sizes.

    The shuffled samples are split among groups of `group_size` clients; inside a group `dirichlet` is drawn until
    every client has half of a fair share; the parts, each ordered by class, are then concatenated and cut again into
    `num_clients` chunks whose sizes differ by at most one, so that a client's border classes move into its neighbour.
    The authors' group_size is 5; the last group may be smaller. Every sample goes to a client.
    """
    ends = np.array([*range(group_size, num_clients, group_size), num_clients])  # clients up to each group's last
    pools = np.split(rng.permutation(len(labels)), ends[:-1] * len(labels) // num_clients)
    parts = []
    for pool, size in zip(pools, np.diff(ends, prepend=0), strict=True):
        wanted, remedy = f"each of {size} clients half of a fair share", "Lower group_size or raise alpha."
        by_class = [pool[labels[pool] == label] for label in np.unique(labels[pool])]
        parts += _draw_until(by_class, int(size), alpha, int(0.5 * len(pool) / size), rng, wanted, remedy)
    return [np.sort(part) for part in np.array_split(np.concatenate(parts), num_clients)]


def _draw_until(
    by_class: list[np.ndarray],
    num_clients: int,
    alpha: float,
    min_samples: int,
    rng: np.random.Generator,
    wanted: str,
    remedy: str,
) -> list[np.ndarray]:
    """Draw partitions of samples until every client has `min_samples`, or until success is unlikely.

    Parts are ordered by class. `wanted` and `remedy` are for the error: what each client should get, and which settings
    to change.
    """
    fair_size = sum(map(len, by_class)) / num_clients
    most = _most_draws(num_clients, len(by_class))
    draws = (_Draw(by_class, num_clients, alpha, fair_size, rng) for _ in range(most))
    with_enough: list[int] = []  # clients that have min_samples, by draw
    more = ""
    for draw in _with_progress(draws, most):
        with_enough.append(int((draw.sizes >= min_samples).sum()))
        if with_enough[-1] == num_clients:
            return draw.parts()
        done = len(with_enough)
        if done == most or (done not in _FIRST_CHECKS and done % _DRAWS_PER_CHECK):
            continue
        if (most - done) * _chance(with_enough, num_clients) < _HOPELESS:
            more = f", and {most} draws are unlikely to"
            break
        if done == _DRAWS_PER_CHECK:
            log.info("partition: none of %d draws fits, trying up to %d", done, most)
    raise ConfigError(f"None of {len(with_enough)} draws with alpha {alpha} gave {wanted}{more}. {remedy}")


def _most_draws(num_clients: int, num_classes: int) -> int:
    return max(1, min(_MAX_DRAWS, _MAX_SHARES // (num_clients * max(1, num_classes))))


def _with_progress(draws: Iterator["_Draw"], total: int) -> Iterator["_Draw"]:
    """Yield the draws, and show progress if they take longer than an eye blinks."""
    started, done = time.monotonic(), 0
    for draw in draws:
        yield draw
        done += 1
        if time.monotonic() - started > _SILENT_SECONDS:
            break
    yield from track(draws, "partition", total - done, "draw")


def _chance(with_enough: list[int], num_clients: int) -> float:
    """Estimate from above the chance that one more draw gives all clients enough, from the draws so far.

    The number of clients with enough is modelled as a sum of independent Bernoulli variables of unequal chances. With
    mean mu and variance s^2 such a sum reaches num_clients most often if some clients always have enough and the m
    others with equal chance r: r = s^2 / (num_clients - mu), m = (num_clients - mu) / (1 - r), and the chance is r^m.
    It is also at most (mu / num_clients)^num_clients. Clients compete for a fixed number of samples, so the true chance
    is lower. Mean and variance are taken three standard errors above those observed.
    """
    mean, variance, draws = float(np.mean(with_enough)), float(np.var(with_enough)), len(with_enough)
    mean += 3 * math.sqrt(variance / draws) + 3 / draws
    variance *= 1 + 3 * math.sqrt(2 / draws)
    lacking = num_clients - mean
    if lacking <= 0:
        return 1.0
    r = (variance + 3 / draws) / lacking  # 3 / draws: an event never seen may still be this frequent
    by_variance = r ** (lacking / (1 - r)) if r < 1 else 1.0
    return min(by_variance, (mean / num_clients) ** num_clients)


class _Draw:
    """One partition, drawn: at first the sizes alone, because most draws are dropped for them.

    Attributes:
        sizes: Samples by client, int64 (num_clients,).
    """

    def __init__(
        self, by_class: list[np.ndarray], num_clients: int, alpha: float, fair_size: float, rng: np.random.Generator
    ) -> None:
        """Draw the shares of every class, and its order."""
        self.sizes = np.zeros(num_clients, np.int64)
        self._samples, self._owners = [], []  # by class
        clients = np.arange(num_clients, dtype=np.int32)
        for members in by_class:
            shuffled = rng.permutation(members)
            share = rng.dirichlet(np.full(num_clients, alpha))
            is_open = self.sizes < fair_size
            share = share * is_open
            if share.sum() == 0:  # alpha is so small that only full clients got a share
                share = is_open.astype(float)
            cuts = (np.cumsum(share / share.sum())[:-1] * len(shuffled)).astype(int)
            counts = np.diff(cuts, prepend=0, append=len(shuffled))
            self.sizes += counts
            self._samples.append(shuffled)
            self._owners.append(np.repeat(clients, counts))

    def parts(self) -> list[np.ndarray]:
        """Return the samples of every client, ordered by class."""
        samples, owners = np.concatenate(self._samples), np.concatenate(self._owners)
        return np.split(samples[np.argsort(owners, kind="stable")], np.cumsum(self.sizes)[:-1])
