"""Worker processes that train the clients of a round side by side on a CPU, with one thread each.

Processes, because Python's interpreter lock limits threads (docs/speed.md has the measurement). Forked, as PyTorch's
DataLoader forks its own: a worker shares the clients' data and the method, which a notebook may define, with its parent
without a copy or pickling, and starts within milliseconds. With one thread each, workers do not wait for one another
inside an operation, and results do not depend on their number.
"""

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ConfigError, PipelineError

Map = Callable[[Any, Sequence[Any]], list[Any]]
"""(shared, items) -> [function(shared, item) for item in items]"""


def resolve(workers: int | Literal["auto"], device: str) -> int:
    """Return the number of workers for `runtime.workers`, which is one if the device is not the CPU.

    "auto" is the number of cores that this process may use, or one where processes cannot fork safely: outside of
    Linux, and in a daemonic process. Raise ConfigError if more are requested there.
    """
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if device != "cpu" or workers == 1 or (workers == "auto" and not can_fork):
        return 1
    if not can_fork:
        raise ConfigError(f"runtime.workers is {workers}, but this system allows only one. Set it to auto.")
    if workers == "auto":
        from joblib import cpu_count  # respects affinity and the limits of containers

        return int(cpu_count())
    return workers


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Compute with one thread per operation inside the block, so that results do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def opened(count: int, function: Callable[[Any, Any], Any]) -> Iterator[Map]:
    """Start workers that compute `function`, and stop them at the end of the block.

    Args:
        count: The number of workers; one is this process itself.
        function: (shared, item) -> result. A worker has it, and everything it refers to, as it is now; what it changes
            stays in the worker.

    Yields:
        A `Map`: it starts items in their order, one per worker at a time, and returns results in the same order. It
        raises an item's exception, and PipelineError if a worker dies; the workers cannot be used afterwards.
    """
    if count == 1:
        yield lambda shared, items: [function(shared, item) for item in items]
        return
    workers: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(count):
            link, process = _start(function)
            workers[link] = process
        yield lambda shared, items: _map(workers, shared, items)
    finally:
        for link, process in workers.items():
            link.close()
            process.terminate()
        for process in workers.values():
            process.join()


def _start(function: Callable[[Any, Any], Any]) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, function), name="train-fl worker", daemon=True)
    with warnings.catch_warnings():
        # From Python 3.12 on, fork warns if other threads run (progress bar, logger). Workers use none of their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    there.close()
    return here, process


def _map(workers: dict[Connection, BaseProcess], shared: Any, items: Sequence[Any]) -> list[Any]:
    results: list[Any] = [None] * len(items)
    waiting = iter(enumerate(items))
    running: dict[Connection, int] = {}

    def start_next(link: Connection) -> None:
        for index, item in waiting:
            running[link] = index
            link.send_bytes(_dumps(_Item(item)))
            break

    message = _dumps(shared)
    for link in list(workers)[: len(items)]:
        with _reporting_death(workers[link]):
            link.send_bytes(message)
            start_next(link)
    while running:
        for link in cast(list[Connection], connection.wait(list(running))):
            with _reporting_death(workers[link]):
                result = pickle.loads(link.recv_bytes())  # noqa: S301 (a child of this process sent it)
                if isinstance(result, _Failure):
                    raise result.error
                results[running.pop(link)] = result
                start_next(link)
    return results


@dataclass(frozen=True)
class _Item:
    value: Any


@dataclass(frozen=True)
class _Failure:
    error: Exception


@contextlib.contextmanager
def _reporting_death(process: BaseProcess) -> Iterator[None]:
    """Turn the error of a closed pipe into one that says how the worker at its other end died."""
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError):
        process.join()
        code = process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise PipelineError(
            f"a training worker died ({how}). If the machine ran out of memory, set runtime.workers to a lower number."
        ) from None


def _serve(link: Connection, function: Callable[[Any, Any], Any]) -> None:
    """Run a worker: a message is an item, to compute, or what all items after it share."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    shared = None
    while True:
        message = pickle.loads(link.recv_bytes())  # noqa: S301 (the parent sent it)
        if isinstance(message, _Item):
            link.send_bytes(_dumps(_attempt(function, shared, message.value)))
        else:
            shared = message


def _exit_with_parent() -> None:
    """End this process if its parent is killed, at once, so that no lock or memory of the run is held."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _attempt(function: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
    try:
        return function(shared, item)
    except Exception as error:
        text = traceback.format_exc()
        try:
            error = pickle.loads(pickle.dumps(error))  # noqa: S301 (it may lack what its class needs)
        except Exception:
            error = RuntimeError(str(error))
        if not isinstance(error, PipelineError):
            error.add_note(text)
        return _Failure(error)


def _dumps(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    """Writes tensors as bytes: PyTorch's own pickling of them is slow, and its sharing fills /dev/shm in containers."""

    def reducer_override(self, value: Any) -> Any:
        """Reduce a tensor to a NumPy array."""
        if isinstance(value, Tensor):
            flat = value.detach().contiguous().view(-1).view(torch.uint8)
            return _tensor, (flat.numpy(), value.dtype, value.shape)
        return NotImplemented


def _tensor(flat: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(flat).view(dtype).view(shape)
