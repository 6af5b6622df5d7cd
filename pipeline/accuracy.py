"""The accuracy of a run as one number, and the words that explain it, the same wherever it is printed.

A run's accuracy is the mean over its last five rounds, because a heterogeneous federation swings by several points from
round to round. (The FedDifRC paper does not say which accuracy it reports.) Over seeds, it is the mean and the sample
standard deviation; a single seed has no deviation, and none is printed.

Two methods are compared seed by seed, because runs of equal seed share their clients and initial weights: most of the
deviation over seeds cancels out in the difference. Its mean has a 95 % confidence interval by Student's t.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_ROUNDS = 5


def of_run(by_round: Sequence[float]) -> float:
    """Return the mean over the last five rounds, or over all rounds if there are fewer."""
    return statistics.fmean(by_round[-_ROUNDS:])


def deviation(by_seed: Sequence[float]) -> float | None:
    """Return the sample standard deviation over seeds (n - 1 in the denominator), or None for one seed."""
    return statistics.stdev(by_seed) if len(by_seed) > 1 else None


def in_percent(by_seed: Sequence[float]) -> str:
    """Format accuracies from 0 to 1 as mean and standard deviation in percent, "81.28 ± 4.88"; one seed as "81.28"."""
    return as_percent(statistics.fmean(by_seed), deviation(by_seed))


def as_percent(mean: float, spread: float | None) -> str:
    """Format a mean and standard deviation as `in_percent` does; `spread` is None for one seed."""
    return f"{100 * mean:.2f}" if spread is None else f"{100 * mean:.2f} ± {100 * spread:.2f}"


@dataclass(frozen=True)
class Gain:
    """How much higher one accuracy is than another, as a fraction of 1.

    Attributes:
        by_seed: The difference of each seed.
        half_width: Half the width of the 95 % confidence interval around the mean, Student's t; None for one seed.
    """

    by_seed: list[float]
    half_width: float | None

    @property
    def mean(self) -> float:
        """Mean difference."""
        return statistics.fmean(self.by_seed)

    @property
    def sign(self) -> int:
        """1 if the whole interval is above 0, -1 if it is below, 0 if it contains 0 or there is none."""
        if self.half_width is None or abs(self.mean) <= self.half_width:
            return 0
        return 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        """Mean and half-width in points, "+2.41 ± 1.30*"; the asterisk marks an interval that excludes 0."""
        mean = f"{round(100 * self.mean, 2) + 0.0:+.2f}"  # + 0.0 turns -0.0 into 0.0
        interval = "" if self.half_width is None else f" ± {100 * self.half_width:.2f}"
        return (mean + interval + ("*" if self.sign else "")).replace("-", "\u2212")


def gain(own: Sequence[float], baseline: Sequence[float]) -> Gain:
    """Compare two accuracies of the same seeds, in the same order."""
    by_seed = [round(one - other, 9) for one, other in zip(own, baseline, strict=True)]  # a tie is 0, not 1e-16
    spread, count = deviation(by_seed), len(by_seed)
    if spread is None:
        return Gain(by_seed, None)
    from scipy.special import stdtrit  # imported here, since only comparisons need it

    return Gain(by_seed, float(stdtrit(count - 1, 0.975)) * spread / count**0.5)


def gain_in_words(seeds: Sequence[int]) -> str:
    """Describe the numbers of `Gain`, for a note below a table."""
    if len(seeds) == 1:
        return "of the one seed"
    return "seed by seed: mean ± half its 95 % confidence interval (Student's t); * marks an interval that excludes 0"


def rounds_in_words(num_rounds: int) -> str:
    """Describe which rounds `of_run` averages: "mean of the last five rounds"."""
    if num_rounds >= _ROUNDS:
        return "mean of the last five rounds"
    return f"mean of all {num_rounds} rounds" if num_rounds > 1 else "after the only round"


def seeds_in_words(seeds: Sequence[int]) -> str:
    """Describe the numbers of `in_percent`: "mean ± standard deviation over seeds 0, 1, 2 (n = 3)"."""
    if len(seeds) == 1:
        return f"one run, seed {seeds[0]} (n = 1)"
    return f"mean ± standard deviation over seeds {', '.join(map(str, seeds))} (n = {len(seeds)})"


def in_words(num_rounds: int, seeds: Sequence[int]) -> str:
    """Describe a table of accuracies: `rounds_in_words`, then `seeds_in_words`."""
    return f"{rounds_in_words(num_rounds)}; {seeds_in_words(seeds)}"
