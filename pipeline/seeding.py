"""Named random generators: every use of randomness has its own, so none affects another.

A generator is keyed by the run's seed and a path of names ("partition", "client", 3), so that adding a draw in one
place changes no number elsewhere. Of the global generators, only torch's is used, to draw initial weights. Only noise
that must stay secret has no name.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, *names: str | int) -> int:
    """Derive a 63-bit seed from the run's seed and a path of names, by SHA-256, so that similar keys are unrelated."""
    key = "\x1f".join(map(str, (seed, *names))).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *names: str | int) -> "np.random.Generator":
    """Return a NumPy generator (PCG64) for this name."""
    import numpy as np

    return np.random.default_rng(derive(seed, *names))


def secret_numpy_generator() -> "np.random.Generator":
    """Return a NumPy generator that the operating system seeds: nobody can draw its numbers again."""
    import numpy as np

    return np.random.default_rng()


def torch_generator(seed: int, *names: str | int) -> "torch.Generator":
    """Return a torch generator for this name; it is on the CPU, so its numbers do not depend on the device."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))


@contextlib.contextmanager
def scoped_global_torch_seed(seed: int, *names: str | int) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block and restore it afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, *names))
        yield
