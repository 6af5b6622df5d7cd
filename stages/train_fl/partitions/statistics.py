"""Statistics of a partition's heterogeneity that papers quote, from its label counts.

With p_k the label shares of client k, g those of all assigned samples and w_k = n_k / n: total variation
TV_k = 1/2 sum |p_k - g| (Zhao et al.'s "EMD" is 2 TV); the generalised Jensen-Shannon divergence H(g) - sum w_k H(p_k),
which is the mutual information of client and label; the mean Hellinger distance of two clients; effective classes
2^H(p_k). Means over clients are unweighted and omit clients without samples; logarithms are to base 2.
"""

import numpy as np

from pipeline.text import first_few

_MOST_NAMES = 10  # in one sentence
_CLIENTS_PER_BLOCK = 512


def label_counts(parts: list[np.ndarray], labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count samples per client and class: int64 (num_clients, num_classes)."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


def left_out(parts: list[np.ndarray], groups: dict[str, tuple[np.ndarray, list[str]]]) -> list[str]:
    """Describe classes, domains and samples that no client gets, and clients without samples, one sentence for each.

    Args:
        parts: Positions of the samples, by client.
        groups: "classes" or "domains" -> for every sample its number, int64 (N,), and the names by number.
    """
    assigned, lines, total = np.concatenate(parts), [], 0
    for kind, (numbers, names) in groups.items():
        total, present = len(numbers), len(np.unique(numbers))
        if missing := [names[number] for number in np.setdiff1d(numbers, numbers[assigned])]:
            lines.append(f"{len(missing)} of {present} {kind} go to no client: {first_few(missing, _MOST_NAMES)}")
    if len(assigned) < total:
        lines.append(f"{total - len(assigned)} of {total} samples go to no client")
    if empty := [str(client) for client, part in enumerate(parts) if not len(part)]:
        lines.append(f"{len(empty)} of {len(parts)} clients have no samples: {first_few(empty, _MOST_NAMES)}")
    return lines


def heterogeneity(counts: np.ndarray) -> dict[str, float | None]:
    """Compute statistics of a partition.

    Args:
        counts: Samples, int64 (num_clients, num_classes); at least one client has some.

    Returns:
        total_variation: mean TV_k, 0 to 1. emd: mean of 2 TV_k. jensen_shannon_bits: 0 to log2(num_clients).
        hellinger: mean over pairs of clients, 0 to 1. effective_classes, classes_present: means, 1 to num_classes.
        size_cv: population standard deviation of sizes over their mean. size_gini: 0 (equal) to 1.
        size_max_over_min: None where a client has no samples.
    """
    all_sizes = counts.sum(1)
    held = counts[all_sizes > 0]
    sizes = held.sum(1)
    shares = held / sizes[:, None]
    pooled = held.sum(0) / sizes.sum()
    variation = 0.5 * np.abs(shares - pooled).sum(1)
    entropy = _entropy_bits(shares)
    statistics = {
        "total_variation": variation.mean(),
        "emd": 2 * variation.mean(),
        "jensen_shannon_bits": max(0.0, _entropy_bits(pooled) - (sizes / sizes.sum()) @ entropy),
        "hellinger": _mean_hellinger(shares),
        "effective_classes": (2**entropy).mean(),
        "classes_present": (held > 0).sum(1).mean(),
        "size_cv": all_sizes.std() / all_sizes.mean(),
        "size_gini": _mean_difference(all_sizes) / (2 * all_sizes.mean()),
    }
    ratio = float(all_sizes.max() / all_sizes.min()) if all_sizes.min() else None
    return {name: float(value) for name, value in statistics.items()} | {"size_max_over_min": ratio}


def _entropy_bits(shares: np.ndarray) -> np.ndarray:
    """Compute the entropy over the last axis; 0 log 0 is 0."""
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(-1)


def _mean_difference(sizes: np.ndarray) -> float:
    """Compute the mean of |a - b| over all ordered pairs: in order, each size counts as often as it is the larger."""
    count = len(sizes)
    return 2 * int(np.sort(sizes) @ (2 * np.arange(count) - count + 1)) / count**2


def _mean_hellinger(shares: np.ndarray) -> float:
    """Compute the mean over unordered pairs of sqrt(1 - sum sqrt(p q)); 0 for a single client."""
    count, total = len(shares), 0.0
    if count < 2:
        return 0.0
    roots = np.sqrt(shares)
    for start in range(0, count, _CLIENTS_PER_BLOCK):  # in blocks: all pairs of 50,000 clients would take 20 GB
        rows, later = np.split(roots[start:], [_CLIENTS_PER_BLOCK])
        within = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
        total += _sum_of_distances(within)
        for columns in np.array_split(later, max(1, len(later) // 8192)):
            total += _sum_of_distances(rows @ columns.T)
    return total / (count * (count - 1) // 2)


def _sum_of_distances(overlap: np.ndarray) -> float:
    """Sum sqrt(1 - overlap), in place."""
    np.subtract(1, overlap, out=overlap)
    return float(np.sqrt(np.maximum(overlap, 0, out=overlap), out=overlap).sum())
