"""Partitions of the training set across clients, one pure function per kind.

Every function takes the `labels` of the samples, int64 (N,), of K classes (or their `domains`, int64 (N,), counted from
0), the number of clients, and `rng`, the source of all its draws. It returns per client an ascending int64 array of
positions in `labels`; no sample goes to two clients. It raises ConfigError if its settings do not fit the data.
`assign` calls the one that a `partitions:` entry names.
"""

from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.settings.params import Section
from stages.train_fl.partitions.dirichlet import dirichlet, dirichlet_balanced
from stages.train_fl.partitions.domains import by_domain, even_clients_per_domain
from stages.train_fl.partitions.label_skew import classes_per_client, label_skew
from stages.train_fl.partitions.long_tail import long_tail
from stages.train_fl.partitions.statistics import heterogeneity, label_counts, left_out

__all__ = [
    "assign", "by_domain", "classes_per_client", "dirichlet", "dirichlet_balanced", "even_clients_per_domain",
    "heterogeneity", "iid", "label_counts", "label_skew", "left_out", "long_tail",
]  # fmt: skip


def assign(
    settings: Section, labels: np.ndarray, domains: np.ndarray, num_clients: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Partition by the kind that `settings`, a `partitions:` entry, names.

    Label skew and a domain partition with a list of counts set their own number of clients.
    """
    values: dict[str, Any] = settings.model_dump()
    kind = values.pop("kind")
    if kind == "label-skew":
        return label_skew(labels, **values, rng=rng)
    if kind == "domain":
        counts = values["clients_per_domain"]
        if counts == "even":
            counts = even_clients_per_domain(num_clients, int(domains.max()) + 1)
        return by_domain(domains, counts, values["samples_fraction"], rng)
    kinds: dict[str, Any] = {
        "dirichlet": dirichlet, "dirichlet-balanced": dirichlet_balanced, "classes-per-client": classes_per_client,
        "iid": iid,
    }  # fmt: skip
    return kinds[kind](labels, num_clients, **values, rng=rng)


def iid(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffle and split into parts whose sizes differ by at most one."""
    if num_clients > len(labels):
        raise ConfigError(f"{len(labels)} samples are too few for {num_clients} clients. Lower train_fl.num_clients.")
    return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), num_clients)]
