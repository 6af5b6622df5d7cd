"""How many threads compute, and how they wait for each other.

Threads that wait sleep, so that a stage does not slow down when other programs use the cores.

The threads of OpenMP, with which torch and scikit-learn compute, spin while they wait. If more threads want to run than
there are cores, a spinning thread takes the core that the thread it waits for needs.
"""

import contextlib
import os
from collections.abc import Iterator


def sleep_while_waiting() -> None:
    """Set this for libraries that are loaded later, unless the user's environment says otherwise."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the OpenMP standard; read when the library is loaded


@contextlib.contextmanager
def single() -> Iterator[None]:
    """Compute with one thread per operation inside the block, so that results do not depend on the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
