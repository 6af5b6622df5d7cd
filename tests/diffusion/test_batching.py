"""Batches: order, fixed shapes, and what happens when memory is short."""

import threading
import time
import weakref

import numpy as np
import pytest
import torch

from pipeline.diffusion import batching
from pipeline.diffusion.batching import Batcher, reproducible
from pipeline.errors import PipelineError


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("total", [0, 1, 4, 11])
def test_rows_come_in_order_and_shapes_never_change(workers, total):
    seen = []

    def compute(index):
        time.sleep(0.002 * (5 - int(index[0]) % 5))  # later batches may be done earlier
        seen.append(len(index))
        return index * 10

    rows = [row for part, out in Batcher(4, workers).map(compute, total) for row in out[: part.stop - part.start]]
    assert rows == [10 * n for n in range(total)]
    assert set(seen) <= {4}


@pytest.mark.parametrize("workers", [1, 3])
def test_out_of_memory_halves_the_batch_and_continues(workers):
    sizes = []

    def compute(index):
        sizes.append(len(index))
        if len(index) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return index.float()

    batcher = Batcher(8, workers)
    table = batcher.table(compute, 19, lambda done: None)
    assert table.tolist() == list(range(19))
    assert batcher.batch_size == 2
    assert set(sizes) == {8, 4, 2}


def test_a_table_takes_its_memory_once():
    batches, alive = weakref.WeakSet(), []

    class Memory(np.ndarray):
        """An array that can be in a weak set."""

        __hash__ = object.__hash__

    def compute(index):
        batches.add(memory := np.zeros(len(index)).view(Memory))
        return torch.from_numpy(memory)

    table = Batcher(2).table(compute, 19, lambda done: alive.append(len(batches)))
    assert len(table) == 19 and len(alive) == 10 and max(alive) <= 2


def test_real_exhaustion_of_cpu_memory_is_handled():
    def compute(index):
        if len(index) > 1:
            torch.empty(2**50)  # a petabyte
        return index

    assert Batcher(2).table(compute, 3, lambda done: None).tolist() == [0, 1, 2]


def test_a_batch_of_one_that_does_not_fit_is_an_error():
    def compute(index):
        raise torch.OutOfMemoryError

    with pytest.raises(PipelineError, match="Not even a batch of one"):
        list(Batcher(4).map(compute, 4))


def test_other_errors_are_not_swallowed():
    def compute(index):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(Batcher(4, 2).map(compute, 9))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_check_stops_between_batches(workers):
    asked = threading.Event()
    done = []

    def check():
        if asked.is_set():
            raise SystemExit(143)

    def compute(index):
        done.append(1)
        if len(done) == 2:
            asked.set()
        return index

    with pytest.raises(SystemExit):
        list(Batcher(1, workers, check).map(compute, 50))
    assert len(done) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_by_fixed_algorithms_and_float32_without_tf32(dtype):
    cudnn = torch.backends.cudnn
    before = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    with reproducible("cuda:0", dtype):
        assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic) == (True, False, True)
        assert cudnn.allow_tf32 == (dtype != torch.float32)
    assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == before


def test_the_cpu_computes_a_batch_on_one_thread():
    before = torch.get_num_threads()
    with reproducible("cpu", torch.float32):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_all_cores_are_used_although_each_batch_has_one_thread(monkeypatch):
    monkeypatch.setattr(batching, "_CORES", 3)
    with batching.reproducible("cpu", torch.float32):
        assert torch.get_num_threads() == 1
        assert batching.workers_for("cpu", positions=64) == 3


def test_small_latents_use_larger_batches_on_the_cpu():
    assert [batching.cpu_batch(positions) for positions in (16, 64, 100, 784, 4096)] == [64, 64, 32, 16, 16]
