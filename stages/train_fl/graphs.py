"""CUDA graphs: a step of local training is captured once per client and round, and then replayed.

A step of a small network is some 150 kernels of a few microseconds each, which Python takes longer to launch than the
GPU to run. A graph launches all of them in one call (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). They
are the kernels of the eager step, in the same order, so results are the same.

Everything that differs between clients and rounds (learning rate, control variates, whether there is a previous model)
is constant during one local training, so a graph per local training needs no inputs but the batch. Capturing costs
about as much as an eager step, and short trainings run eagerly.
"""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch

from pipeline.errors import PipelineError
from stages.train_fl.client_data import RawBatch

_EAGER_STEPS = 3  # before capturing: libraries choose kernels and allocate workspaces in a function's first calls
FEWEST_STEPS = 12  # for which capturing pays

_capturing = threading.Lock()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Capture the block; after an error in it, the stream can be used again."""
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # which says again that the capture failed
            graph.capture_end()
        raise
    graph.capture_end()


class Graphs:
    """The graphs of one network's trainings, one after the other, in one pool of memory."""

    def __init__(self) -> None:
        """Start without a graph."""
        self._last: torch.cuda.CUDAGraph | None = None  # kept, because the pool lives as long as one of its graphs
        self._stream: torch.cuda.Stream | None = None  # always the same, because memory is reused only within a stream

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return new graphs: a copied network has tensors of its own."""
        return type(self)()

    @contextlib.contextmanager
    def capturable_stream(self, device: torch.device) -> Iterator[None]:
        """Run the block on a stream that can be captured: the current one, unless it is the default stream.

        Work queued before and after the block is ordered with it.
        """
        outer = torch.cuda.current_stream(device)
        if outer != torch.cuda.default_stream(device):
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            yield
        outer.wait_stream(self._stream)

    def capture(self, step: Callable[[RawBatch], None], example: RawBatch) -> Callable[[RawBatch], None]:
        """Capture `step` without running it, and return a function that runs it on a batch of the example's shapes."""
        inputs = [tensor.clone() for tensor in example.tensors]
        graph = torch.cuda.CUDAGraph()
        # One capture at a time in the process. Meanwhile other threads may go on, but no graph may be destroyed, which
        # would end the capture: neither the last one nor, by the garbage collector, those of an earlier run.
        with _capturing, _no_garbage_collection():
            pool = self._last.pool() if self._last else None
            try:
                with _recording(graph, pool):
                    step(example.like(inputs))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                problem = f"a training step cannot be captured as a CUDA graph ({reason})"
                remedy = "Set runtime.cuda_graphs to false, or capturable = False in the method's class"
                raise PipelineError(f"{problem}. {remedy}.") from error
            self._last = graph

        def replay(batch: RawBatch) -> None:
            for own, given in zip(inputs, batch.tensors, strict=True):
                own.copy_(given)
            graph.replay()

        return replay

    def runner(self, step: Callable[[RawBatch], None], batch_size: int) -> Callable[[RawBatch], None]:
        """Return `step`, which is replayed from a graph for full batches once enough of them have run eagerly."""
        replay: Callable[[RawBatch], None] | None = None
        done = 0

        def run(batch: RawBatch) -> None:
            nonlocal replay, done
            if len(batch) == batch_size and done >= _EAGER_STEPS:
                replay = replay or self.capture(step, batch)
                replay(batch)
            else:
                step(batch)
                done += 1

        return run
