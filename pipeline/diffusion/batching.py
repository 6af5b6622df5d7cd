"""Fixed-shape batches sized to fit memory.

- On a GPU, batches run one after the other, as large as memory allows; a batch that does not fit is halved and retried.
  The batch size decides which kernels run: the same bytes need the same GPU and batch size, other results differ by
  rounding.
- On the CPU, small batches run in parallel, each on one thread. Results then depend neither on the number of threads
  nor (measured, for batches of 16 and more) on the other rows of a batch: features are identical to the byte for any
  number of cores and processes.
- The last batch is padded by repeating its last row, so that shapes never change.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from pipeline import memory, threads
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)
T = TypeVar("T")

CPU_BATCH = 16
_CORES = torch.get_num_threads()  # at import: OMP_NUM_THREADS, or the number of cores
_LARGEST = 512  # pairs; beyond it a GPU gains nothing, and 32-bit indices of large maps overflow
_CPU_BYTES_PER_POSITION = 64 * 1024  # of a latent, for one pass of a Stable Diffusion UNet in float32


class Batcher:
    """Calls a function for batches of rows and yields the results in order."""

    def __init__(self, batch_size: int, workers: int = 1, check: Callable[[], None] = lambda: None) -> None:
        """Compute `workers` batches in parallel, 1 on a GPU; `check` runs before each and may raise to stop."""
        self.batch_size, self._workers, self._check = batch_size, workers, check
        self.computed = 0  # rows processed so far, excluding padding
        self._resizing = threading.Lock()

    @property
    def parallel_rows(self) -> int:
        """Rows processed at the same time."""
        return self.batch_size * self._workers

    def map(self, compute: Callable[[Tensor], T], total: int) -> Iterator[tuple[slice, T]]:
        """Yield (rows, compute(index)) for rows 0 to `total`, in order.

        `index` is int64 (batch_size,). If fewer rows are left, its last entry is repeated; drop the results beyond
        `rows`.

        Raises:
            PipelineError: Not even one row fits into memory.
        """
        for rows, result in self._map(compute, total):
            self.computed += rows.stop - rows.start
            yield rows, result

    def _map(self, compute: Callable[[Tensor], T], total: int) -> Iterator[tuple[slice, T]]:
        if self._workers == 1:
            for rows in self._slices(total):
                yield from self._fitting(compute, rows)
            return
        pending: deque[Future[list[tuple[slice, T]]]] = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for rows in self._slices(total):
                    pending.append(pool.submit(lambda part: list(self._fitting(compute, part)), rows))
                    if len(pending) > self._workers:
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def table(self, compute: Callable[[Tensor], Tensor], total: int, done: Callable[[int], Any]) -> Tensor:
        """Concatenate the results (B, ...) of all batches, (total, ...); `done` is called with the rows of each."""
        table: Tensor | None = None
        for rows, result in self.map(compute, total):
            if table is None:
                table = result.new_empty((total, *result.shape[1:]))  # not a list of parts, which would need it twice
            table[rows] = result[: rows.stop - rows.start]
            done(rows.stop - rows.start)
        assert table is not None
        return table

    def _slices(self, total: int) -> Iterator[slice]:
        start = 0
        while start < total:
            yield slice(start, start := min(start + self.batch_size, total))

    def _fitting(self, compute: Callable[[Tensor], T], rows: slice) -> Iterator[tuple[slice, T]]:
        """Compute the rows in one batch or, if it does not fit into memory, in batches of half the size."""
        self._check()
        size, full = rows.stop - rows.start, self.batch_size
        if size <= full:
            result, fits = self._attempt(compute, rows, full)
            if fits:
                yield rows, result
                return
            self._halve(full)
        step = self.batch_size  # may shrink again meanwhile
        for start in range(rows.start, rows.stop, step):
            yield from self._fitting(compute, slice(start, min(start + step, rows.stop)))

    @staticmethod
    def _attempt(compute: Callable[[Tensor], T], rows: slice, size: int) -> tuple[Any, bool]:
        index = torch.arange(rows.start, rows.start + size).clamp(max=rows.stop - 1)
        try:
            return compute(index), True
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
        return None, False  # outside the handler, which would hold the batch's tensors in its traceback

    def _halve(self, full: int) -> None:
        with self._resizing:
            if self.batch_size < full:  # another batch has halved it already
                return
            if full == 1:
                raise PipelineError(
                    "Not even a batch of one fits into memory. Use a device with more memory or a smaller image_size."
                )
            self.batch_size = full // 2
            log.warning("Out of memory with batches of %d; continuing with %d.", full, self.batch_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def cpu_batch(positions: int) -> int:
    """Return the pairs per batch on the CPU: 16, or up to 64 for latents so small that call overhead would dominate."""
    return max(CPU_BATCH, min(64, 4096 // positions // CPU_BATCH * CPU_BATCH))


def batch_size(wanted: Literal["auto"] | int, device: str, positions: int, blank_pass: Callable[[Tensor], Any]) -> int:
    """Return the pairs per batch of the denoiser: the number requested, or one that suits the device.

    `positions` is height times width of a latent; `blank_pass` runs a pass for an index of rows, to measure GPU memory.
    """
    if wanted != "auto":
        return wanted
    if device == "cpu":
        return cpu_batch(positions)
    size = _largest_batch(blank_pass, device) if device.startswith("cuda") else CPU_BATCH
    log.info("batches of %d passes fit into memory", size)
    return size


def workers_for(device: str, positions: int) -> int:
    """Return how many batches to compute in parallel: one on a GPU; one per core on the CPU, if memory allows."""
    if device != "cpu":
        return 1
    fitting = memory.available() // (cpu_batch(positions) * positions * _CPU_BYTES_PER_POSITION)
    return max(1, min(_CORES, fitting))


def _largest_batch(compute: Callable[[Tensor], Any], device: str) -> int:
    """Find the power of two up to 512 that fills 4/5 of a GPU's free memory, by measuring two small batches.

    A pass is measured while the maps of another are held, as they are by those who read maps batch by batch.
    """
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free -= torch.cuda.memory_allocated(device)
    peaks = []
    for size in (8, 16):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        index = torch.zeros(size, dtype=torch.int64)
        held = compute(index)
        compute(index)
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
        del held
    torch.cuda.empty_cache()
    per_row = max(1, (peaks[1] - peaks[0]) / 8)
    fitting = int(0.8 * free / per_row)
    return 1 << (min(max(fitting, 1), _LARGEST).bit_length() - 1)


@contextlib.contextmanager
def reproducible(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Compute reproducibly: one thread per batch on the CPU; fixed algorithms, and no TF32 in float32, on a GPU."""
    if device == "cpu":
        with threads.single():
            yield
    else:
        tf32, products = dtype != torch.float32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False  # a training in this process may have allowed it
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = products
