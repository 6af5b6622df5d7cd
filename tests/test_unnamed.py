"""Tensors in files without a name: equal, in no folder, without open files, and gone with their last use."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from pipeline import memory
from pipeline.errors import PipelineError
from pipeline.io import unnamed

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "transposed": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).t(),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "bool": torch.tensor([True, False, True]),
    "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "int64": torch.tensor([2**40]),
}


def test_tensors_are_equal_and_can_be_changed(tmp_path):
    found = unnamed.on_disk(TENSORS, tmp_path)
    assert list(found) == list(TENSORS)
    for name, value in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name], value) and found[name].is_contiguous()
    found["matrix"].add_(1)
    assert torch.equal(found["matrix"], TENSORS["matrix"] + 1)
    assert torch.equal(found["transposed"], TENSORS["transposed"])  # its neighbour


@pytest.mark.parametrize("tensors", [{}, {"empty": torch.zeros(0, 3)}])
def test_nothing_is_written_for_nothing(tmp_path, tensors):
    assert unnamed.on_disk(tensors, tmp_path / "folder") == tensors
    assert not (tmp_path / "folder").exists()


def test_files_have_no_name_and_are_not_open(tmp_path):
    before = len(os.listdir("/dev/fd"))
    kept = [unnamed.on_disk(TENSORS, tmp_path / "new" / "folder") for _ in range(50)]
    assert len(os.listdir("/dev/fd")) == before and len(kept) == 50
    assert not list((tmp_path / "new" / "folder").iterdir())


@pytest.mark.skipif(memory.anonymous() is None, reason="the system does not report anonymous memory")
def test_tensors_occupy_the_disk_until_they_are_dropped(disk):
    """40 MB in files of 2 MB, of which each is dropped before the next but one: the disk has 24 MB."""
    part, before, kept = torch.zeros(500_000), memory.anonymous(), {}
    free = shutil.disk_usage(disk).free
    for number in range(10):
        kept[number] = unnamed.on_disk({"part": part + number}, disk)
    assert free - shutil.disk_usage(disk).free >= 20_000_000
    assert sum(int(own["part"].sum()) for own in kept.values()) == 45 * 500_000
    assert memory.anonymous() - before < 10_000_000
    for number in range(10, 20):
        del kept[number - 10]
        kept[number] = unnamed.on_disk({"part": part + number}, disk)
    kept.clear()
    assert shutil.disk_usage(disk).free == free


def test_full_disk_is_reported_on_one_line(disk):
    before = shutil.disk_usage(disk).free
    with pytest.raises(PipelineError, match=r"disk cannot be written \(No space left on device\)\. Make room on"):
        unnamed.on_disk({"large": torch.zeros(8_000_000)}, disk)
    assert shutil.disk_usage(disk).free == before and not list(disk.iterdir())


def test_killed_process_leaves_nothing(disk):
    before = shutil.disk_usage(disk).free
    code = (
        "import os, shutil, signal, sys, torch; from pathlib import Path; from pipeline.io import unnamed\n"
        "kept = unnamed.on_disk({'large': torch.ones(1_000_000)}, Path(sys.argv[1]))\n"
        "assert kept['large'].sum() == 1e6\n"
        "print(shutil.disk_usage(sys.argv[1]).free, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(disk)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert int(done.stdout) <= before - 4_000_000
    assert shutil.disk_usage(disk).free == before and not list(disk.iterdir())
