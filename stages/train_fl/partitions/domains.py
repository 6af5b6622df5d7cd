"""Domain shift: every client draws from one domain (protocol of RethinkFL, FPL and F2DC on Digits and Office)."""

import numpy as np

from pipeline.errors import PipelineError


def by_domain(
    domains: np.ndarray, clients_per_domain: list[int], samples_fraction: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Each client gets a random part of one domain's samples, disjoint from every other client's.

    Args:
        domains: int64 (N,), counted from 0.
        clients_per_domain: number of clients of domain 0, 1, ...; F2DC's are 3, 6, 6, 5 (MNIST, USPS, SVHN, SYN).
        samples_fraction: each client's share of its domain, in (0, 1]; 0.01 for Digits, 0.2 for Office-Caltech.
        rng: decides which samples go where.

    Returns:
        Per client, in the order of the domains, an ascending int64 array.

    Raises:
        PipelineError: the counts are not one per domain, or a domain is too small for its clients.
    """
    num_domains = int(domains.max()) + 1
    if len(clients_per_domain) != num_domains or not any(clients_per_domain):
        raise PipelineError(
            f"clients_per_domain = {clients_per_domain} must have one number for each of the data set's {num_domains} "
            "domains, not all of them 0"
        )
    parts = []
    for domain, count in enumerate(clients_per_domain):
        members = rng.permutation(np.flatnonzero(domains == domain))
        size = max(1, int(samples_fraction * len(members) + 1e-9))
        if count * size > len(members):
            raise PipelineError(
                f"domain {domain} has {len(members)} samples, not {count} times {size}: lower samples_fraction "
                "or clients_per_domain"
            )
        parts += [np.sort(members[size * k : size * (k + 1)]) for k in range(count)]
    return parts


def even_clients_per_domain(num_clients: int, num_domains: int) -> list[int]:
    """Client counts that differ by one at most, the first domains having one more."""
    return [num_clients // num_domains + (domain < num_clients % num_domains) for domain in range(num_domains)]
