"""Partitions by class: biased and unbiased clients ("NID2"), and k classes per client.

Neither the FedDifRC paper nor its public code defines its NID2. The best sourced interpretation is FedDisco's NIID-2
(Ye et al., ICML 2023): 5 biased clients of 2 classes each and 1 unbiased client, all of equal size, which is
`label_skew(labels, 5, 2, 1, rng)`.
"""

import numpy as np

from pipeline.errors import ConfigError


def label_skew(
    labels: np.ndarray, n_biased: int, classes_per_biased: int, n_unbiased: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Give biased clients a few classes each and unbiased ones all; all clients have the same size.

    Biased client i has the classes (i * classes_per_biased + j) mod K, j < classes_per_biased, in equal parts; an
    unbiased client has every class in equal parts. The size is the largest that no class is too small for, rounded
    down to a multiple of K; the remaining samples are not used (20 of CIFAR-10's 50,000 at 5/2/1). A biased client has
    up to classes_per_biased - 1 samples fewer where its number of classes, at most K, does not divide the size. Biased
    clients come first.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    num_classes = len(classes)
    if classes_per_biased > num_classes or n_biased + n_unbiased == 0:
        raise ConfigError(
            f"label skew does not fit a data set of {num_classes} classes (n_biased {n_biased}, classes_per_biased "
            f"{classes_per_biased}, n_unbiased {n_unbiased}). Lower classes_per_biased, or raise a number of clients."
        )
    owned = np.zeros((n_biased + n_unbiased, num_classes))  # each client's share of its samples, by class
    for client in range(n_biased):
        owned[client, np.arange(client * classes_per_biased, (client + 1) * classes_per_biased) % num_classes] = 1
    owned[n_biased:] = 1
    owned /= owned.sum(1, keepdims=True)
    demand = owned.sum(0)
    per_class = int((sizes[demand > 0] / demand[demand > 0]).min() / num_classes + 1e-9)  # of an unbiased client
    if per_class == 0:
        raise ConfigError(
            f"{len(labels)} samples are too few for {len(owned)} clients of equal parts of their classes. Lower "
            "n_biased or n_unbiased, or raise prepare_data.train_subset."
        )
    quota = np.floor(owned * (per_class * num_classes) + 1e-9).astype(int)  # (num_clients, num_classes)
    return _draw(labels, classes, quota, rng)


def classes_per_client(
    labels: np.ndarray, num_clients: int, num_classes_each: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Give every client k <= K classes (NIID-Bench's "#label = k"): McMahan's pathological split with random classes.

    Client i has class i mod K and k - 1 others drawn without replacement; a class's samples are assigned evenly to the
    clients that have it. A class that no client has is not used.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    num_classes = len(classes)
    if num_classes_each > num_classes:
        raise ConfigError(f"num_classes_each is {num_classes_each}, but there are {num_classes} classes. Lower it.")
    has = np.zeros((num_clients, num_classes), bool)
    for client in range(num_clients):
        first = client % num_classes
        others = rng.permutation(np.delete(np.arange(num_classes), first))[: num_classes_each - 1]
        has[client, [first, *others]] = True
    rank = np.cumsum(has, 0) - 1  # a client's place among the owners of a class
    owners = np.maximum(has.sum(0), 1)
    quota = np.where(has, sizes // owners + (rank < sizes % owners), 0)
    return _draw(labels, classes, quota, rng)


def _draw(labels: np.ndarray, classes: np.ndarray, quota: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Give client i quota[i, c] random samples of each class c, none twice."""
    parts: list[list[np.ndarray]] = [[] for _ in quota]
    for column, label in enumerate(classes):
        shuffled = rng.permutation(np.flatnonzero(labels == label))
        for part, assigned in zip(parts, np.split(shuffled, np.cumsum(quota[:, column])), strict=False):
            part.append(assigned)
    return [np.sort(np.concatenate(part)) for part in parts]
