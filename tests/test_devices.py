"""Which device a process gets, and how tensors are sent there."""

import pytest
import torch

from pipeline import devices
from pipeline.errors import ConfigError


@pytest.fixture
def machine(monkeypatch):
    """Return a function that pretends a machine with some GPUs, seen by a process of a local rank."""

    def pretend(gpus: int, rank: int | None, visible: str | None = None) -> list[int]:
        chosen: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        for name, value in (("LOCAL_RANK", rank), ("CUDA_VISIBLE_DEVICES", visible)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))
        return chosen

    return pretend


def test_a_process_uses_the_gpu_of_its_rank(machine):
    chosen = machine(4, 2)
    assert devices.resolve("auto") == devices.resolve("cuda") == "cuda:2"
    assert chosen == [2, 2]  # so that no context is opened on the first GPU
    assert devices.resolve("cuda:1") == "cuda:1" and chosen[-1] == 1
    with pytest.raises(ConfigError, match="runtime.device = cuda:4: this machine has 4 GPUs"):
        devices.resolve("cuda:4")


def test_more_processes_than_gpus_are_rejected(machine):
    machine(2, 2)
    with pytest.raises(ConfigError, match="Local rank 2 has no GPU. Start at most 2 processes here"):
        devices.resolve("auto")
    machine(1, 1)  # without CUDA_VISIBLE_DEVICES, the machine has one GPU
    with pytest.raises(ConfigError, match="Local rank 1 has no GPU"):
        devices.resolve("auto")


def test_a_process_that_sees_one_gpu_uses_it(machine):
    machine(1, 3, visible="3")  # as under Slurm with one GPU per task
    assert devices.resolve("auto") == "cuda:0"


def test_without_ranks_and_without_gpus(machine):
    machine(2, None)
    assert devices.resolve("auto") == "cuda"
    machine(0, None)
    assert devices.resolve("auto") == "cpu"
    with pytest.raises(ConfigError, match="no usable CUDA GPU"):
        devices.resolve("cuda")


def test_tensors_are_sent_unchanged():
    values = torch.arange(3)
    assert torch.equal(devices.send(values, torch.device("cpu")), values)
