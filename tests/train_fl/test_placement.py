"""Data that do not fit into memory are read from disk: which, how, with the same results, and in how much memory."""

import logging
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from pipeline.data.datasets import PreparedDataset
from stages.train_fl import data as run_data
from stages.train_fl import run
from stages.train_fl.client_data import Batches, ClientData
from stages.train_fl.images import ImagesOnDisk, in_parts
from stages.train_fl.placement import Placement, Sizes, choose
from tests.conftest import REPOSITORY
from tests.train_fl import tiny_project

FILES = ("rounds.csv", "clients.csv", "config.json", "details.json", "model.safetensors")


def on_host(sizes: Sizes, free: int) -> str:
    """Return the initials of the places of images, guidance and held-out images on a CPU."""
    chosen = choose(sizes, None, free)
    return "".join(place[1] for place in (chosen.images, chosen.guidance, chosen.held_out))  # d-e-vice or d-i-sk


def test_what_does_not_fit_stays_on_disk_and_what_is_read_most_cheaply_first():
    sizes = Sizes(images=300, guidance=200, held_out=100)
    # three quarters may be used: 600, 400, 300 and 100 bytes for everything, and without one, the other, or both
    assert [on_host(sizes, free) for free in (800, 799)] == ["eee", "eie"]
    assert [on_host(sizes, free) for free in (534, 533)] == ["eie", "iee"]
    assert [on_host(sizes, free) for free in (400, 399)] == ["iee", "iie"]
    assert [on_host(sizes, free) for free in (134, 133)] == ["iie", "iii"]
    assert on_host(Sizes(300, 0, 100), 133) == "iei"  # without guidance there is nothing to read


def test_a_gpu_holds_everything_or_the_held_out_images_only():
    sizes = Sizes(300, 200, 100)
    assert choose(sizes, 800, 0) == Placement("device", "device", "device")
    assert choose(sizes, 799, 667) == Placement("host", "host", "device")
    assert choose(sizes, 799, 666) == Placement("host", "disk", "device")
    assert choose(sizes, 134, 0) == Placement("disk", "disk", "device")
    assert choose(sizes, 133, 800) == Placement("host", "host", "host")
    # a server that trains no client
    assert choose(Sizes(300, 0, 100), 10_000, 400, trains_here=False) == Placement("host", "host", "device")
    assert choose(Sizes(300, 0, 100), 10_000, 399, trains_here=False) == Placement("disk", "host", "device")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A memory map of 40 images that begins in the middle of a page, and the same images in memory."""
    file = tmp_path_factory.mktemp("store") / "images"
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 5, 3), np.uint8)
    file.write_bytes(b"\0" * 5000 + images.tobytes())
    return np.memmap(file, np.uint8, "r", 5000, images.shape), images


def test_images_on_disk_behave_as_a_tensor(store):
    mapped, images = store
    rows = np.array([7, 3, 3, 39, 0, 12, 8])
    expected = torch.from_numpy(images[rows].transpose(0, 3, 1, 2))
    on_disk = ImagesOnDisk((mapped,), rows)
    assert len(on_disk) == 7 and on_disk.shape == expected.shape and on_disk.nbytes == expected.nbytes
    assert torch.equal(on_disk.to("cpu"), expected) and on_disk.to("cpu").is_contiguous()
    index = torch.tensor([6, 0, 0])
    assert torch.equal(on_disk[index], expected[index])
    for size in (3, 7, 100):
        assert [len(part) for part in on_disk.split(size)] == [len(part) for part in expected.split(size)]
        for found in (map(torch.Tensor.clone, in_parts(expected, size)), in_parts(on_disk, size)):
            assert torch.equal(torch.cat(list(found)), expected)
    nothing = ImagesOnDisk((mapped,), np.empty(0, np.int64))
    assert nothing.to("cpu").shape == (0, 3, 5, 5) and [len(part) for part in nothing.split(4)] == [0]


def test_images_of_several_stores_are_counted_from_one_to_the_next(store):
    mapped, images = store
    found = ImagesOnDisk((mapped, images[:4], mapped), np.array([43, 39, 44, 40, 83])).to("cpu")
    assert torch.equal(found, torch.from_numpy(images[[3, 39, 0, 0, 39]].transpose(0, 3, 1, 2)))


def test_a_large_map_is_read_in_blocks_and_row_by_row(tmp_path):
    size = 836  # two images of 2.1 MB in a block, which are searched for pages one by one if they are 32 apart
    images = np.zeros((34, size, size, 3), np.uint8)
    images[:, :2, :2] = np.random.default_rng(0).integers(0, 256, (34, 2, 2, 3), np.uint8)
    images.tofile(tmp_path / "images")
    mapped = np.memmap(tmp_path / "images", np.uint8, "r", 0, images.shape)
    rows = np.array([33, 0, 5, 1, 18, 33, 2])
    assert torch.equal(ImagesOnDisk((mapped,), rows).to("cpu"), torch.from_numpy(images[rows]).permute(0, 3, 1, 2))


@pytest.mark.parametrize("num_views", [1, 2])
def test_batches_from_disk_are_those_from_memory(store, num_views):
    mapped, _ = store
    rows, labels = np.arange(3, 26), torch.arange(23)
    on_disk = ClientData(ImagesOnDisk((mapped,), rows), labels)
    in_memory = ClientData(on_disk.images.to("cpu"), labels)
    drawn = [
        list(Batches(data, 2, 5, "views", torch.Generator().manual_seed(1), num_views=num_views))
        for data in (in_memory, on_disk)
    ]
    assert len(drawn[0]) == 10
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert num_views == 1 or torch.equal(one.second_view, other.second_view)


def test_only_batches_from_disk_are_read_ahead_and_the_thread_ends_with_them(store):
    mapped, _ = store
    images = ImagesOnDisk((mapped,), np.arange(20))

    def reading():
        return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]

    for own, number in ((images, 1), (images.to("cpu"), 0)):
        batches = Batches(ClientData(own, torch.arange(20)), 2, 5, "none", torch.Generator()).raw()
        next(batches)
        assert len(reading()) == number
        batches.close()  # as after an error in a step
        assert not reading()


# 48 training images of 192 bytes, 24 held out; targets of 104 bytes: (3 prompts + 1) * 6 dimensions * 4 bytes, and 8
SIZES = Sizes(images=9216, guidance=4992, held_out=4608)
PLACES = 20_000, 14_000, 8_000, 0  # on disk: the targets; the images; both; the held-out images, too


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Return a function that trains with everything in memory, once per method, and gives the files of the run."""
    found = {}

    def files(method):
        if method not in found:
            project = _project(tmp_path_factory.mktemp(method), method)
            found[method] = _contents(run(project, method, "dir", 0))
        return found[method]

    return files


def _project(root, method, **changes):
    ssl = {"train_fl__augmentation": "views"} if method == "simsiam" else {}
    project = tiny_project.make(root, train_fl__num_rounds=2, **ssl, **changes)
    if method == "feddifrc":
        tiny_project.add_features(project)
    return project


def _contents(path):
    return {name: (path / name).read_bytes() for name in FILES if name != "details.json"}


@pytest.mark.parametrize(
    ("method", "free", "workers"),
    [("fedavg", 0, 1), ("simsiam", 0, 2), ("feddifrc", 0, 1), *(("feddifrc", free, 2) for free in PLACES)],
)
def test_runs_from_disk_give_the_same_bytes(tmp_path, monkeypatch, caplog, reference, method, free, workers):
    expected = reference(method)  # trained before memory is short, by two workers
    project = _project(tmp_path, method, runtime__workers=workers)
    monkeypatch.setattr("pipeline.memory.available", lambda: free)
    opened = run_data.on_disk(project, method, "dir", 0)
    assert opened.sizes == (SIZES if method == "feddifrc" else Sizes(SIZES.images, 0, SIZES.held_out))
    with caplog.at_level(logging.WARNING):
        path = run(project, method, "dir", 0)
    assert ("9.22 kB of images are read from disk" in caplog.text) == (free < 20_000)
    assert ("4.99 kB of guidance targets are" in caplog.text) == (method == "feddifrc" and free != 14_000)
    assert ("4.61 kB of held-out images are" in caplog.text) == (free == 0)
    found = _contents(path)
    assert {name for name in found if found[name] != expected[name]} <= {"config.json"}  # which has runtime.workers


def test_targets_are_read_block_by_block(tmp_path, monkeypatch):
    project = _project(tmp_path, "feddifrc")
    loaded = run_data.load(project, "feddifrc", "dir", 0, "cpu")
    monkeypatch.setattr("stages.train_fl.guidance._READ", 5)  # the largest client has more samples than two blocks
    again = run_data.load(project, "feddifrc", "dir", 0, "cpu")
    assert max(map(len, loaded.clients)) > 10
    for one, other in zip(loaded.clients, again.clients, strict=True):
        for name, values in vars(one.guidance).items():
            assert torch.equal(values, getattr(other.guidance, name)), name
    nbytes = sum(value.nbytes for own in loaded.clients for value in vars(own.guidance).values())
    assert nbytes == SIZES.guidance


def test_terms_that_are_not_used_are_not_counted(tmp_path):
    project = _project(tmp_path, "feddifrc", **{"methods.feddifrc.tdcl_weight": 0})
    loaded = run_data.load(project, "feddifrc", "dir", 0, "cpu")
    nbytes = sum(value.nbytes for own in loaded.clients for value in vars(own.guidance).values())
    assert nbytes == run_data.on_disk(project, "feddifrc", "dir", 0).sizes.guidance == 48 * (6 * 4 + 8)


def test_a_server_keeps_its_clients_off_the_device_and_without_targets(tmp_path):
    project = _project(tmp_path, "feddifrc")
    loaded = run_data.load(project, "feddifrc", "dir", 0, "cpu", trains_here=False)
    assert loaded.guidance_dim == tiny_project.DIMS and all(own.guidance is None for own in loaded.clients)
    images = torch.cat([own.images for own in loaded.clients]).permute(0, 2, 3, 1).numpy()
    stored = PreparedDataset(project.dataset_dir).load("train").images
    assert np.array_equal(images, stored[np.concatenate(loaded.parts)])


def test_memory_used_is_what_was_counted(tmp_path):
    # 3,000 images of 27,648 bytes: 83 MB, with 25 MB of them held out
    code = f"""
import numpy as np, torch
from pathlib import Path
from pipeline import memory
from pipeline.data import datasets
from stages.train_fl import data as run_data
from stages.train_fl.client_data import Batches
from tests.conftest import REPOSITORY
from tests.train_fl import tiny_project

changes = {{"train_fl__evaluate_on": "validation", "train_fl__validation_fraction": 0.3,
            "train_fl__imbalance_factor": 0.9}}
project = tiny_project.make(Path({str(tmp_path)!r}), **changes)
dataset = datasets.PreparedDataset(project.dataset_dir)
run_data.load(project, "fedavg", "iid", 0, "cpu")  # loads the libraries
images = datasets.Images.of_one_domain(np.zeros((3000, 96, 96, 3), np.uint8), np.arange(3000) % 3)
splits = {{"train": images, "test": dataset.load("test")}}
splits["test"] = datasets.Images.of_one_domain(images.images[:8], images.labels[:8])
datasets.write(project.dataset_dir, "tiny", "test", datasets.Source(tiny_project.CLASSES, splits, "none"))
del images, splits
available, memory.available = memory.available, lambda: 0
before = memory.peak()
on_disk = run_data.load(project, "fedavg", "iid", 0, "cpu")
for client in on_disk.clients:
    for batch in Batches(client, 1, 8, "none", torch.Generator()).raw():
        pass
after = memory.peak()
memory.available = available
in_memory = run_data.load(project, "fedavg", "iid", 0, "cpu")
print(on_disk.sizes.images + on_disk.sizes.held_out, after - before, memory.peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    counted, from_disk, in_memory = map(int, done.stdout.split())

    assert counted > 75e6
    assert from_disk < 0.5 * counted  # blocks while the file is checked, and batches
    assert 0.9 * counted < in_memory < 1.1 * counted + from_disk
