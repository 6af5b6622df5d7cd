"""How many threads compute, and how they wait for each other.

Threads that wait sleep, so that a stage does not slow down when other programs use the cores.

The threads of OpenMP, with which torch and scikit-learn compute, spin while they wait. If more threads want to run than
there are cores, a spinning thread takes the core that the thread it waits for needs.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


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


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function(item) for every item; while the caller uses a result, a thread computes the next one.

    `items` are drawn in the caller's thread. The thread lives from the first result to the last, so that a process has
    none when it forks before or after.
    """
    import torch

    pending: deque[Future[Result]] = deque()
    # torch gives a new thread all cores until it is told the number.
    with ThreadPoolExecutor(1, "ahead", torch.set_num_threads, (1,)) as thread:
        for item in items:
            pending.append(thread.submit(function, item))
            if len(pending) > 1:
                yield pending.popleft().result()
        for last in pending:
            yield last.result()
