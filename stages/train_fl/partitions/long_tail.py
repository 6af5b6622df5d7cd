"""Long tail: a reduction of the training set before any partition (Cui et al., CVPR 2019).

Class c of C keeps n_max * imbalance_factor^(c / (C - 1)) samples; class 0 is the head. Public helpers take
n_max = N / C and so cut every class to that size even at factor 1, losing samples of naturally unbalanced sets; here
n_max is the largest class's size, and smaller classes keep what they have.
"""

import numpy as np


def long_tail(labels: np.ndarray, imbalance_factor: float, rng: np.random.Generator) -> np.ndarray:
    """Choose the samples to keep: ascending int64 positions.

    The imbalance factor is the size of the last class relative to the first, in (0, 1]; 0.01 is "IR 100" and 1 keeps
    all. CIFAR-10 at 0.01 keeps 5000, 2997, 1796, 1077, 645, 387, 232, 139, 83 and 50 samples.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    exponent = np.arange(len(classes)) / max(1, len(classes) - 1)
    wanted = (sizes.max() * imbalance_factor**exponent + 1e-9).astype(int)
    kept = [
        rng.permutation(np.flatnonzero(labels == label))[:count]
        for label, count in zip(classes, np.maximum(1, wanted), strict=True)
    ]
    return np.sort(np.concatenate(kept))
