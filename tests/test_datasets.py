"""The prepared data set: written block by block, completely or not at all, and read back."""

import hashlib
import os
import resource
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from pipeline import provenance
from pipeline.data import datasets, images
from pipeline.data.datasets import Images, PreparedDataset, Source, stratified_split, write
from pipeline.data.images import Block, Skipped
from pipeline.errors import PipelineError
from pipeline.io import locks

SIZE = 8


def make_images(rows, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (rows, SIZE, SIZE, 3), np.uint8)
    return Images(pixels, rng.integers(0, 3, rows), rng.integers(0, 2, rows))


LARGER = Images.of_one_domain(np.zeros((2, 9, 9, 3), np.uint8), np.zeros(2, np.int64))


def make_source(**changes):
    source = Source(["a", "b", "c"], {"train": make_images(17, 0), "test": make_images(4, 1)}, "none", ["x", "y"])
    return replace(source, **changes)


@pytest.fixture
def small_blocks(monkeypatch):
    """Five images per block."""
    monkeypatch.setattr(images, "BLOCK_BYTES", 5 * 3 * SIZE * SIZE)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "sets" / "ours", "ours", "made", make_source())


def test_written_data_set_is_read_back(small_blocks, path):
    dataset = PreparedDataset(path)
    assert (dataset.class_names, dataset.domain_names, dataset.image_size) == (["a", "b", "c"], ["x", "y"], SIZE)
    for split, expected in (("train", make_images(17, 0)), ("test", make_images(4, 1))):
        loaded = dataset.load(split)
        assert len(loaded) == dataset.rows(split) == len(expected)
        for name, values in vars(expected).items():
            assert np.array_equal(getattr(loaded, name), values)


def test_images_are_a_read_only_map_and_labels_are_arrays(path):
    loaded = PreparedDataset(path).load("train")
    assert isinstance(loaded.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        loaded.images[0] = 0
    index = np.array([16, 0, 3])
    taken, expected = loaded.take(index), make_images(17, 0)
    for rows in (loaded.images[index], taken.images):
        assert type(rows) is np.ndarray and rows.flags.writeable
        assert np.array_equal(rows, expected.images[index])
    assert np.array_equal(taken.labels, expected.labels[index])
    assert np.array_equal(taken.domains, expected.domains[index])
    assert np.array_equal(loaded.take(index).take(np.array([2])).images[0], expected.images[3])


def test_memory_map_survives_replacement_of_the_data_set(path):
    loaded = PreparedDataset(path).load("train")
    write(path, "ours", "made", make_source(splits={"train": make_images(2, 7), "test": make_images(2, 8)}))
    assert np.array_equal(loaded.images, make_images(17, 0).images)
    assert PreparedDataset(path).rows("train") == 2


def test_hash_covers_pixels_labels_domains_and_names(small_blocks, path, tmp_path):
    splits = {}
    for split, content in (("train", make_images(17, 0)), ("test", make_images(4, 1))):
        data = (
            content.images.tobytes() + content.labels.astype("<i8").tobytes() + content.domains.astype("<i8").tobytes()
        )
        splits[split] = {"rows": len(content), "sha256": hashlib.sha256(data).hexdigest()}
    names = {"class_names": ["a", "b", "c"], "domain_names": ["x", "y"]}
    assert PreparedDataset(path).hash == provenance.fingerprint({**names, "splits": splits})

    train = make_images(17, 0)
    changes = [
        {"class_names": ["b", "a", "c"]},
        {"domain_names": ["y", "x"]},
        {"splits": {"train": replace(train, labels=(train.labels + 1) % 3), "test": make_images(4, 1)}},
        {"splits": {"train": replace(train, domains=1 - train.domains), "test": make_images(4, 1)}},
        {"splits": {"train": replace(train, images=train.images[::-1]), "test": make_images(4, 1)}},
    ]
    others = [write(tmp_path / str(k), "ours", "made", make_source(**change)) for k, change in enumerate(changes)]
    hashes = {PreparedDataset(other).hash for other in [path, *others]}
    assert len(hashes) == 1 + len(changes)
    renamed = write(tmp_path / "renamed", "theirs", "made elsewhere", make_source(licence="another"))
    assert PreparedDataset(renamed).hash == PreparedDataset(path).hash


def test_bytes_do_not_depend_on_the_block_size(path, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "BLOCK_BYTES", 1)
    again = write(tmp_path / "again", "ours", "made", make_source())
    for file in path.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "test.h5", "train.h5"]


class Gappy(Images):
    """Images of which every third, and all of rows 4 to 7, are broken."""

    def blocks(self, start=0):
        for start in range(0, len(self), 4):
            rows = np.arange(start, min(start + 4, len(self)))
            good = rows[(rows % 3 != 0) & ((rows < 4) | (rows > 7))]
            yield Block(good, self.images[good], [Skipped(f"{row}.png", "bad") for row in rows if row not in good])


def test_labels_and_domains_of_skipped_images_are_dropped(small_blocks, tmp_path):
    train = make_images(17, 0)
    source = make_source(splits={"train": Gappy(**vars(train)), "test": make_images(4, 1)})
    gappy = write(tmp_path / "gappy", "ours", "made", source)
    kept = np.array([1, 2, 8, 10, 11, 13, 14, 16])
    clean = make_source(splits={"train": train.take(kept), "test": make_images(4, 1)})
    expected = write(tmp_path / "clean", "ours", "made", clean)
    assert (gappy / "train.h5").read_bytes() == (expected / "train.h5").read_bytes()
    assert PreparedDataset(gappy).hash == PreparedDataset(expected).hash
    skipped = [image.path for image in PreparedDataset(gappy).manifest.skipped["train"]]
    assert skipped == [f"{row}.png" for row in (0, 3, 4, 5, 6, 7, 9, 12, 15)]


def test_single_domain_is_named_like_the_data_set(tmp_path):
    splits = {split: Images.of_one_domain(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2)) for split in datasets.SPLITS}
    dataset = PreparedDataset(write(tmp_path / "one", "one", "made", Source(["a", "b"], splits, "none")))
    assert dataset.domain_names == ["one"]
    assert dataset.load("test").domains.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["a", "b"]}, "The train split has a label beyond the 2 classes"),
        ({"domain_names": ["x"]}, "The train split has a domain beyond the 1 domains"),
        ({"class_names": ["a", "b", "b"]}, "have the same name \\('b';"),
        ({"splits": {"train": make_images(3, 0), "test": make_images(0, 0)}}, "The test split has no images"),
        ({"splits": {"train": make_images(3, 0), "test": LARGER}}, "The splits of ours have images of different sizes"),
    ],
)
def test_inconsistent_source_changes_nothing(path, change, message):
    before = PreparedDataset(path).hash
    with pytest.raises(PipelineError, match=message):
        write(path, "ours", "made", make_source(**change))
    assert PreparedDataset(path).hash == before
    assert list(path.parent.iterdir()) == [path]


class Dying(Images):
    """Images whose third block kills the process."""

    def blocks(self, start=0):
        for number, block in enumerate(super().blocks(start)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield block


KILLED = """
import sys
from pathlib import Path
from pipeline.data import images
from tests.test_datasets import Dying, SIZE, make_images, make_source, write
images.BLOCK_BYTES = 5 * 3 * SIZE * SIZE
splits = {"train": Dying(**vars(make_images(17, 3))), "test": make_images(4, 1)}
write(Path(sys.argv[1]), "ours", "made", make_source(splits=splits))
"""


def test_killed_write_leaves_the_old_data_set_or_none(path, tmp_path, quick_python):
    before = PreparedDataset(path).hash
    for target in (path, tmp_path / "sets" / "fresh"):
        killed = subprocess.run([quick_python, "-c", KILLED, str(target)], check=False, cwd=os.getcwd())
        assert killed.returncode == -signal.SIGKILL
    assert PreparedDataset(path).hash == before
    PreparedDataset(path).load("train")
    with pytest.raises(PipelineError, match="is missing. Run `pipeline prepare-data`"):
        PreparedDataset(tmp_path / "sets" / "fresh")
    (tmp_path / "sets" / "fresh.tmp" / "train.h5.head").write_bytes(b"half")
    write(tmp_path / "sets" / "fresh", "ours", "made", make_source())  # what the killed run left is cleared
    assert sorted(entry.name for entry in (tmp_path / "sets" / "fresh").iterdir()) == [
        "manifest.json",
        "test.h5",
        "train.h5",
    ]


def test_second_writer_is_rejected(path):
    with locks.held(path.with_name("ours.lock"), "another process"):
        with pytest.raises(PipelineError, match="ours is being written by process"):
            write(path, "ours", "made", make_source())
    write(path, "ours", "made", make_source())
    assert [file.name for file in path.parent.iterdir()] == ["ours"]


def test_full_disk_is_detected_before_decoding(path, monkeypatch):
    class Endless(Images):
        image_size = 10**7

        def blocks(self, start=0):
            raise AssertionError("decoded")

    splits = {"train": Endless(**vars(make_images(16, 0))), "test": Endless(**vars(make_images(4, 1)))}
    with pytest.raises(PipelineError, match=r"needs 6000000.0 GB and .* free"):  # 20 * 3 * 1e14 bytes
        write(path, "ours", "made", make_source(splits=splits))
    PreparedDataset(path).load("train")


def test_disk_that_fills_up_while_writing_is_reported(path):
    before = PreparedDataset(path).hash
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the nearest to a full disk that needs no disk
    try:
        with pytest.raises(
            PipelineError,
            match=r"ours cannot be written \(File too large\)\. Make room .* is unchanged",
        ):
            write(path, "ours", "made", make_source(splits={"train": make_images(2000, 0), "test": make_images(4, 1)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert PreparedDataset(path).hash == before
    assert list(path.parent.iterdir()) == [path]


def test_stratified_split_by_hand():
    # shares of 4 out of 6, 3, 1: 2.4, 1.2, 0.4 -> 2, 1, 0 and one more to the largest remainder, the first of two
    labels = np.array([0] * 6 + [1] * 3 + [2])
    chosen, rest = stratified_split(labels, 4, np.random.default_rng(0))
    assert np.bincount(labels[chosen], minlength=3).tolist() == [3, 1, 0]
    assert np.array_equal(np.sort(np.concatenate([chosen, rest])), np.arange(10))
    assert (np.diff(chosen) > 0).all() and (np.diff(rest) > 0).all()
