"""When a training step is replayed from a graph; the capture itself needs a GPU (benchmarks/gpu_check.py)."""

import copy

import pytest
import torch

from stages.train_fl.client_data import RawBatch
from stages.train_fl.graphs import Graphs


def batch(size: int) -> RawBatch:
    return RawBatch(torch.zeros(size, 3, 2, 2, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64), torch.zeros(0))


@pytest.fixture
def graphs(monkeypatch):
    """Graphs whose capture gives a function that notes its batches."""
    made = Graphs()
    made.captured, made.replayed = [], []

    def capture(step, example):
        made.captured.append(len(example))
        return lambda raw: made.replayed.append(len(raw))

    monkeypatch.setattr(made, "capture", capture)
    return made


def test_full_batches_are_replayed_after_some_eager_ones(graphs):
    eager = []
    run = graphs.runner(lambda raw: eager.append(len(raw)), 4)
    for size in (4, 4, 2, 4, 4, 2, 4):  # three full batches and a ragged one in each epoch
        run(batch(size))
    assert eager == [4, 4, 2, 2]  # ragged batches stay eager
    assert graphs.captured == [4] and graphs.replayed == [4, 4, 4]


def test_each_training_has_its_own_graph(graphs):
    for _ in range(2):
        run = graphs.runner(lambda raw: None, 4)
        for _ in range(5):
            run(batch(4))
    assert graphs.captured == [4, 4]


def test_a_copied_network_gets_new_graphs():
    graphs = Graphs()
    graphs._last = object()
    assert copy.deepcopy(graphs)._last is None


def test_tensors_of_a_batch_keep_their_places():
    raw = batch(3)
    again = raw.like([value + 1 for value in raw.tensors])
    assert torch.equal(again.images, raw.images + 1) and torch.equal(again.labels, raw.labels + 1)
    assert again.guidance is None
