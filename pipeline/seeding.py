"""Named random generators, so that every random draw says what it is for and none disturbs another.

A generator is keyed by the run's seed and a path of names ("partition", "client", 3). Adding a draw in one place
therefore changes no number anywhere else, and nothing reads or moves a global generator, except inside
`scoped_global_torch_seed`, which puts it back: torch's layers draw their initial weights from it.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed from the run's seed and a path of names; SHA-256, so near keys give unrelated seeds."""
    key = "\x1f".join(map(str, (seed, *names))).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *names: str | int) -> "np.random.Generator":
    """A NumPy generator (PCG64) for this name."""
    import numpy as np

    return np.random.default_rng(derive(seed, *names))


def torch_generator(seed: int, *names: str | int) -> "torch.Generator":
    """A torch generator on the CPU for this name: the same numbers whatever the device used later."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))


@contextlib.contextmanager
def scoped_global_torch_seed(seed: int, *names: str | int) -> Iterator[None]:
    """Seeds torch's global CPU generator for the block and restores it after."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, *names))
        yield
