"""Workers that train the clients of a round side by side: processes on a CPU, streams on a GPU (`on_streams`).

On a CPU, every worker has one thread.

Processes, because Python's interpreter lock limits threads (docs/speed.md has the measurement). Forked, as PyTorch's
DataLoader forks its own: a worker shares the clients' data and the method, which a notebook may define, with its parent
without a copy or pickling, and starts within milliseconds. With one thread each, workers do not wait for one another
inside an operation, and results do not depend on their number.
"""

import contextlib
import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import ConfigError, PipelineError
from pipeline.io.system_errors import in_words

Map = Callable[[Any, Sequence[Any]], list[Any]]
"""(shared, items) -> [function(shared, item) for item in items]"""

_STREAMS = 4


def resolve(workers: int | Literal["auto"], device: str) -> int:
    """Return the number of workers for `runtime.workers`.

    On the CPU, "auto" is the number of cores that this process may use, or one where processes cannot fork safely:
    outside of Linux, and in a daemonic process. Raise ConfigError if more are requested there. On a GPU it is the
    number of streams, of which four fill it with small networks.
    """
    if device.startswith("cuda"):
        return _STREAMS if workers == "auto" else workers
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if device != "cpu" or workers == 1 or (workers == "auto" and not can_fork):
        return 1
    if not can_fork:
        raise ConfigError(f"runtime.workers is {workers}, but this process can start none. Set it to auto.")
    if workers == "auto":
        from joblib import cpu_count  # respects affinity and the limits of containers

        return int(cpu_count())
    return workers


@contextlib.contextmanager
def opened(count: int, function: Callable[[Any, Any], Any], memory: int = 2**24) -> Iterator[Map]:
    """Start workers that compute `function`, and stop them at the end of the block.

    Args:
        count: The number of workers; one is this process itself.
        function: (shared, item) -> result. A worker has it, and everything it refers to, as it is now; what it changes
            stays in the worker.
        memory: Bytes that each worker shares with this process, for the tensors of a message; more go through a pipe.

    Yields:
        A `Map`: it starts items in their order, one per worker at a time, and returns results in the same order. It
        raises an item's exception, and PipelineError if a worker dies; the workers cannot be used afterwards.
    """
    if count == 1:
        yield lambda shared, items: [function(shared, item) for item in items]
        return
    workers: list[_Worker] = []
    try:
        for number in range(1, count + 1):
            try:
                workers.append(_Worker(function, memory, [worker.link for worker in workers]))
            except OSError as error:
                problem = f"training worker {number} of {count} cannot be started ({in_words(error)})"
                raise PipelineError(f"{problem}. Set runtime.workers to a lower number.") from None
        yield lambda shared, items: _map(workers, shared, items)
    finally:
        for worker in workers:
            worker.stop()


@contextlib.contextmanager
def on_streams(functions: Sequence[Callable[[Any, Any], Any]], device: str) -> Iterator[Map]:
    """Compute items side by side on one GPU: every function in a thread and a stream of its own.

    Threads are enough here: they only queue work for the GPU. The functions must compute the same and share no tensor
    that they change. Yields a `Map` that raises the first item's exception.
    """
    free: queue.SimpleQueue[tuple[Callable[[Any, Any], Any], torch.cuda.Stream]] = queue.SimpleQueue()
    for function in functions:
        free.put((function, torch.cuda.Stream(device)))

    def compute(shared: Any, item: Any, caller: torch.cuda.Stream) -> Any:
        function, stream = free.get()
        try:
            # What the caller has queued comes first: it wrote `shared`, and may still read this stream's old results.
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                result = function(shared, item)
            stream.synchronize()
            return result
        finally:
            free.put((function, stream))

    with ThreadPoolExecutor(len(functions), "stream", torch.set_num_threads, (1,)) as pool:

        def map_items(shared: Any, items: Sequence[Any]) -> list[Any]:
            caller = torch.cuda.current_stream(device)
            return [done.result() for done in [pool.submit(compute, shared, item, caller) for item in items]]

        try:
            yield map_items
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, only the clients in training are waited for


def _map(workers: list["_Worker"], shared: Any, items: Sequence[Any]) -> list[Any]:
    results: list[Any] = [None] * len(items)
    waiting = iter(enumerate(items))
    running: dict[Any, tuple[_Worker, int]] = {}
    for worker, (index, item) in zip(workers, waiting, strict=False):
        worker.send((True, shared, item))
        running[worker.link] = worker, index
    while running:
        for link in connection.wait(list(running)):
            worker, index = running.pop(link)
            results[index] = worker.receive()
            for following, item in waiting:
                worker.send((False, None, item))
                running[link] = worker, following
                break
    return results


class _Worker:
    """A worker process, seen from its parent: a request is sent, then its result is received."""

    def __init__(self, function: Callable[[Any, Any], Any], memory: int, other_links: list[Connection]) -> None:
        context = multiprocessing.get_context("fork")
        self.link, child_link = context.Pipe()
        self._memory = mmap.mmap(-1, memory)  # shared with the worker, and not limited by the size of /dev/shm
        inherited = [*other_links, self.link]
        arguments = child_link, inherited, self._memory, function
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with warnings.catch_warnings(), _signals_held():
            # From Python 3.12 on, fork warns if other threads run, as those of a progress bar or a logger. Neither
            # training nor sending results uses their locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        child_link.close()

    def send(self, value: Any) -> None:
        with self._reporting_death():
            _send(self.link, self._memory, value)

    def receive(self) -> Any:
        with self._reporting_death():
            result = _receive(self.link, self._memory)
        if isinstance(result, _Failure):
            raise result.error
        return result

    def stop(self) -> None:
        self._process.kill()  # a worker has nothing to clean up, and may have no signal handlers yet
        self._process.join()
        self.link.close()
        self._process.close()
        self._memory.close()

    @contextlib.contextmanager
    def _reporting_death(self) -> Iterator[None]:
        """Turn the error of a closed pipe into one that says how the worker died."""
        try:
            yield
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(timeout=1)
            code = self._process.exitcode or 0
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            advice = "If memory ran out, set runtime.workers to a lower number." if code < 0 else "Run it again."
            raise PipelineError(f"a training worker died ({how}). {advice}") from None


@dataclass(frozen=True)
class _Failure:
    error: Exception


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Deliver Ctrl-C and SIGTERM only after the block: Python loses their exceptions while it forks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    link: Connection, inherited: list[Connection], memory: mmap.mmap, function: Callable[[Any, Any], Any]
) -> None:
    """Run a worker: compute requests until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    for other in inherited:
        other.close()
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    shared = None
    while True:
        try:
            is_first, value, item = _receive(link, memory)
        except EOFError:  # the parent was interrupted while it started this worker
            return
        if is_first:
            shared = value
        try:
            _send(link, memory, function(shared, item))
        except Exception as error:
            _send(link, memory, _failure(error))
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
                stream.flush()


def _exit_with_parent() -> None:
    """End this process if its parent is killed, at once, so that no lock or memory of the run is held."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _failure(error: Exception) -> _Failure:
    """Return an error in a form that can be sent; one that is not meant for users says where it was raised."""
    if not isinstance(error, PipelineError):
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
        except Exception:
            error = RuntimeError(f"{type(error).__name__} in a training worker")
        error.add_note(text)
    return _Failure(error)


def _send(link: Connection, memory: mmap.mmap, value: Any) -> None:
    """Send a value, its tensors through `memory` as far as they fit.

    (PyTorch's own pickling of tensors is slow, and its sharing fills /dev/shm, which containers keep small.)
    """
    sizes: list[int] = []

    def place(buffer: pickle.PickleBuffer) -> bool:
        """Write a tensor's bytes to the memory; True if they must stay in the message instead."""
        raw, start = buffer.raw(), sum(sizes)
        if start + raw.nbytes > len(memory):
            return True
        memory[start : start + raw.nbytes] = raw
        sizes.append(raw.nbytes)
        return False

    stream = io.BytesIO()
    _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=place).dump(value)
    link.send((sizes, stream.getvalue()))


def _receive(link: Connection, memory: mmap.mmap) -> Any:
    """Receive what `_send` sent; tensors are copies, which the caller owns."""
    sizes, message = link.recv()
    with memoryview(memory) as view:
        ends = itertools.accumulate(sizes)
        buffers = [bytearray(view[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    return pickle.loads(message, buffers=buffers)  # noqa: S301 (the other end of the pipe is our own process)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Reduce a tensor to its bytes, and an error to its state."""
        if isinstance(value, PipelineError):  # without __init__, which may take other arguments than `args`
            return _error, (type(value), value.args, vars(value))
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return NotImplemented
        value = value.detach().resolve_conj().resolve_neg()
        is_channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        flat = (value.permute(0, 2, 3, 1) if is_channels_last else value).contiguous().view(-1).view(torch.uint8)
        return _tensor, (pickle.PickleBuffer(flat.numpy()), value.dtype, value.shape, is_channels_last)


def _error(kind: type[PipelineError], args: tuple[Any, ...], state: dict[str, Any]) -> PipelineError:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(state)
    return error


def _tensor(buffer: Any, dtype: torch.dtype, shape: torch.Size, is_channels_last: bool) -> Tensor:
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(buffer, dtype=dtype)
    if not is_channels_last:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
