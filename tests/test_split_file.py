"""An interrupted data set: the next process reads only the images that are missing, and the bytes are the same."""

import logging
import os
import signal
import subprocess

import numpy as np
import pytest

from pipeline.data import decode, images, split_file
from pipeline.data.datasets import Source, write
from pipeline.data.images import Block, Images, Skipped
from pipeline.errors import DataError, PipelineError
from pipeline.io.atomic import KEPT
from pipeline.sigterm import Terminated
from tests.test_datasets import SIZE, make_images

BROKEN = 6


class Recorded(Images):
    """Images with an identity; the seventh is broken, and `stop_at` is the block before which something happens."""

    version, stop_at, error = "one", 10**9, KeyboardInterrupt
    read: list[int] = []

    def identity(self):
        return self.version

    def blocks(self, start=0):
        for number, block in enumerate(super().blocks(start)):
            if number == self.stop_at:
                if self.error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise self.error
            Recorded.read += block.rows.tolist()
            good = block.rows != BROKEN
            skipped = [Skipped(f"image {row}", "is empty") for row in block.rows[~good]]
            yield Block(block.rows[good], block.images[good], skipped, block.rows[good].astype(np.uint64) + 2**63)


def source(stop_at=10**9, error=KeyboardInterrupt, version="one", split="train"):
    splits = {"train": Recorded(**vars(make_images(32, 0))), "test": Recorded(**vars(make_images(9, 1)))}
    for recorded in splits.values():
        recorded.__dict__["version"] = version
    splits[split].__dict__.update(stop_at=stop_at, error=error)
    return Source(["a", "b", "c"], splits, "none", ["x", "y"])


def small_blocks():
    """Five images per block, and a save after each."""
    images.BLOCK_BYTES = 5 * 3 * SIZE * SIZE
    split_file.SECONDS_BETWEEN_SAVES = 0.0


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setattr(images, "BLOCK_BYTES", 5 * 3 * SIZE * SIZE)
    monkeypatch.setattr(split_file, "SECONDS_BETWEEN_SAVES", 0.0)
    Recorded.read = []


@pytest.fixture
def expected(tmp_path):
    """The bytes of an uninterrupted write."""
    found = contents(write(tmp_path / "expected", "ours", "made", source()))
    Recorded.read = []
    return found


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


KILLED = """
import sys
from pathlib import Path
from tests import test_split_file as test
test.small_blocks()
test.write(Path(sys.argv[1]), "ours", "made", test.source(stop_at=3, error=None))
"""


def test_killed_write_is_continued(tmp_path, expected, caplog, quick_python):
    killed = subprocess.run([quick_python, "-c", KILLED, str(tmp_path / "set")], check=False)
    assert killed.returncode == -signal.SIGKILL
    caplog.set_level(logging.INFO)
    assert contents(write(tmp_path / "set", "ours", "made", source())) == expected
    assert Recorded.read == [*range(15, 32), *range(9)]  # three blocks of five images were finished
    assert "train: continuing after 15 of 32 images" in caplog.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["expected", "set"]


def test_finished_split_is_not_read_again(tmp_path, expected):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", "ours", "made", source(stop_at=1, split="test"))
    Recorded.read = []
    assert contents(write(tmp_path / "set", "ours", "made", source())) == expected
    assert Recorded.read == [5, 6, 7, 8]


def test_error_keeps_finished_work_and_the_old_data_set(tmp_path, expected):
    write(tmp_path / "set", "ours", "made", source(version="old"))
    before = contents(tmp_path / "set")
    with pytest.raises(DataError, match="1 images cannot be read|2 images cannot be read"):
        write(tmp_path / "set", "ours", "made", source(), skip_broken=False)
    assert contents(tmp_path / "set") == before
    Recorded.read = []
    assert contents(write(tmp_path / "set", "ours", "made", source(), skip_broken=True)) == expected
    assert Recorded.read == []


@pytest.mark.parametrize("changed", ["images", "pillow-heif"])
def test_changed_images_or_decoders_start_over(tmp_path, monkeypatch, expected, changed):
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as earlier:
        earlier.setitem(decode.VERSIONS, changed, "another")
        write(tmp_path / "set", "ours", "made", source(stop_at=3, version="other" if changed == "images" else "one"))
    Recorded.read = []
    assert contents(write(tmp_path / "set", "ours", "made", source())) == expected
    assert Recorded.read == [*range(32), *range(9)]


@pytest.mark.parametrize("damage", ["pixel", "head", "length", "gone"])
def test_damaged_unfinished_file_is_repaired(tmp_path, expected, damage):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", "ours", "made", source(stop_at=3))
    file = tmp_path / "set.tmp" / "train.h5"
    content = bytearray(file.read_bytes())
    kept = 15
    if damage == "pixel":  # of the image 7, which is the seventh in the file: in the second block
        content[content.index(make_images(32, 0).images[7].tobytes())] ^= 1
        kept = 5
    elif damage == "head":
        content[:100] = bytes(100)
    elif damage == "length":
        content = content[: len(content) // 2]  # 4096 bytes: the head's 2048, and ten images of 192
        kept = 10
    file.write_bytes(content)
    if damage == "gone":
        file.unlink()
        kept = 0
    Recorded.read = []
    assert contents(write(tmp_path / "set", "ours", "made", source())) == expected
    assert Recorded.read[0] == kept and Recorded.read[-9:] == list(range(9))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, Terminated])
def test_interrupt_saves_what_is_there(tmp_path, monkeypatch, expected, interrupt):
    monkeypatch.setattr(split_file, "SECONDS_BETWEEN_SAVES", 1000.0)
    with pytest.raises(interrupt) as caught:
        write(tmp_path / "set", "ours", "made", source(stop_at=3, error=interrupt()))
    assert caught.value.__notes__ == [KEPT]
    Recorded.read = []
    assert contents(write(tmp_path / "set", "ours", "made", source())) == expected
    assert Recorded.read == [*range(15, 32), *range(9)]


def test_interrupt_within_a_block_saves_the_blocks_before(tmp_path, monkeypatch, expected):
    monkeypatch.setattr(split_file, "SECONDS_BETWEEN_SAVES", 1000.0)
    add = split_file.SplitFile._add

    def interrupted(self, rows, files, skipped):
        add(self, rows, files, skipped)
        if 16 in rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as once:
        once.setattr(split_file.SplitFile, "_add", interrupted)
        write(tmp_path / "set", "ours", "made", source())
    Recorded.read = []
    assert contents(write(tmp_path / "set", "ours", "made", source())) == expected
    assert Recorded.read[0] == 15


@pytest.mark.parametrize(
    ("version", "stop_at", "error"), [("one", 3, OSError()), ("one", 0, KeyboardInterrupt()), (None, 3, Terminated())]
)
def test_short_write_keeps_no_journal(tmp_path, monkeypatch, version, stop_at, error):
    monkeypatch.setattr(split_file, "SECONDS_BETWEEN_SAVES", 1000.0)
    with pytest.raises((type(error), PipelineError)) as caught:
        write(tmp_path / "set", "ours", "made", source(stop_at, error, version))
    assert list(tmp_path.iterdir()) == [] and not hasattr(caught.value, "__notes__")


def test_identity_of_image_files_follows_their_content(tmp_path):
    from pipeline.data.lazy_images import ImageFiles, LazyImages

    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"one")
    files = LazyImages.of(ImageFiles(tmp_path, ["a", "b"], 8), np.zeros(2, np.int64))
    first = files.identity()
    assert files.identity() == first != files.take(np.array([1, 0])).identity()
    (tmp_path / "b").write_bytes(b"other")
    assert LazyImages.of(ImageFiles(tmp_path, ["a", "b"], 8), np.zeros(2, np.int64)).identity() != first


def test_files_of_drawn_splits_are_looked_up_once(tmp_path, monkeypatch):
    from pipeline.data import lazy_images

    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"one")
    looked_up, state_of = [], lazy_images.state_of
    monkeypatch.setattr(lazy_images, "state_of", lambda path: looked_up.append(path.name) or state_of(path))
    files = lazy_images.LazyImages.of(lazy_images.ImageFiles(tmp_path, ["a", "b"], 8), np.zeros(2, np.int64))
    split_file.journal_name({"train": files.take(np.array([0])), "test": files.take(np.array([1]))})
    assert looked_up == ["a", "b"]
