"""How a run's accuracy is condensed, and said in the same words wherever it is printed.

A run's number is the mean over its last five rounds (which one the FedDifRC paper reports is unknown; from round
to round a heterogeneous federation swings by several points). Over seeds it is mean and sample standard deviation; one
seed has no deviation, and none is printed.
"""

import statistics
from collections.abc import Sequence

_ROUNDS = 5


def of_run(by_round: Sequence[float]) -> float:
    """Mean over the last five rounds, or over all if there are fewer; accuracies from 0 to 1."""
    return statistics.fmean(by_round[-_ROUNDS:])


def rounds_in_words(num_rounds: int) -> str:
    """Which rounds `of_run` averages: "mean of the last five rounds", or of as many as there were."""
    if num_rounds >= _ROUNDS:
        return "mean of the last five rounds"
    return f"mean of all {num_rounds} rounds" if num_rounds > 1 else "after the only round"


def deviation(by_seed: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds (n - 1 in the denominator); None for one seed."""
    return statistics.stdev(by_seed) if len(by_seed) > 1 else None


def in_percent(by_seed: Sequence[float]) -> str:
    """Mean and standard deviation over seeds in percent, "81.28 ± 4.88"; the mean alone for one seed."""
    spread = deviation(by_seed)
    mean = f"{100 * statistics.fmean(by_seed):.2f}"
    return mean if spread is None else f"{mean} ± {100 * spread:.2f}"


def seeds_in_words(seeds: Sequence[int]) -> str:
    """What `in_percent` gives: "mean ± standard deviation over seeds 0, 1, 2", or that there is one seed."""
    if len(seeds) == 1:
        return f"one run, of seed {seeds[0]} (n = 1)"
    return f"mean ± standard deviation over seeds {', '.join(map(str, seeds))} (n = {len(seeds)})"
