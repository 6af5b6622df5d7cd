"""The accuracy of a run as one number, and the words that explain it, the same wherever it is printed.

A run's accuracy is the mean over its last five rounds, because a heterogeneous federation swings by several points from
round to round. (The FedDifRC paper does not say which accuracy it reports.) Over seeds, it is the mean and the sample
standard deviation; a single seed has no deviation, and none is printed.
"""

import statistics
from collections.abc import Sequence

_ROUNDS = 5


def of_run(by_round: Sequence[float]) -> float:
    """Return the mean over the last five rounds, or over all rounds if there are fewer."""
    return statistics.fmean(by_round[-_ROUNDS:])


def deviation(by_seed: Sequence[float]) -> float | None:
    """Return the sample standard deviation over seeds (n - 1 in the denominator), or None for one seed."""
    return statistics.stdev(by_seed) if len(by_seed) > 1 else None


def in_percent(by_seed: Sequence[float]) -> str:
    """Format accuracies from 0 to 1 as mean and standard deviation in percent, "81.28 ± 4.88"; one seed as "81.28"."""
    spread = deviation(by_seed)
    mean = f"{100 * statistics.fmean(by_seed):.2f}"
    return mean if spread is None else f"{mean} ± {100 * spread:.2f}"


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
