"""Domain shift: every client draws from one domain (protocol of RethinkFL, FPL and F2DC on Digits and Office)."""

import numpy as np

from pipeline.errors import ConfigError


def by_domain(
    domains: np.ndarray, clients_per_domain: list[int], samples_fraction: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Give each client a random part of one domain's samples, in the order of the domains.

    F2DC has 3, 6, 6, 5 clients per domain (MNIST, USPS, SVHN, SYN). `samples_fraction` is each client's share of its
    domain, in (0, 1]; 0.01 for Digits, 0.2 for Office-Caltech.
    """
    num_domains = int(domains.max()) + 1
    if len(clients_per_domain) != num_domains or not any(clients_per_domain):
        raise ConfigError(
            f"clients_per_domain does not fit {num_domains} domains ({clients_per_domain}). Give one number per "
            "domain, at least one of them above 0."
        )
    parts = []
    for domain, count in enumerate(clients_per_domain):
        members = rng.permutation(np.flatnonzero(domains == domain))
        size = max(1, int(samples_fraction * len(members) + 1e-9))
        if count * size > len(members):
            raise ConfigError(
                f"domain {domain} has {len(members)} samples, not {count} times {size}. Lower samples_fraction or "
                "clients_per_domain."
            )
        parts += [np.sort(members[size * k : size * (k + 1)]) for k in range(count)]
    return parts


def even_clients_per_domain(num_clients: int, num_domains: int) -> list[int]:
    """Return client counts that differ by at most one, the first domains having one more."""
    return [num_clients // num_domains + (domain < num_clients % num_domains) for domain in range(num_domains)]
