"""Broken images among good ones: prepare-data names all, or skips and lists them; equal inputs give equal bytes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pipeline.data import images, lazy_images
from tests.prepare_data.image_files import colours, save_plain

BROKEN = {"train/a/05.png": "is empty", "train/b/00.png": "is not of a known image format", "test/a/1.png": "truncated"}


@pytest.fixture
def folder(tmp_path):
    """40 training images of two classes, colour (label, number, 0), three in it broken; and four test images."""
    root = tmp_path / "in"
    for label, name in enumerate("ab"):
        for number in range(20):
            save_plain(root / "train" / name / f"{number:02d}.png", (label, number, 0))
        for number in range(2):
            save_plain(root / "test" / name / f"{number}.png", (label, number, 1))
    (root / "train/a/05.png").write_bytes(b"")
    (root / "train/b/00.png").write_text("404")
    content = (root / "test/a/1.png").read_bytes()
    (root / "test/a/1.png").write_bytes(content[:-25])
    return root


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    """Several tasks and several blocks even for few images."""
    monkeypatch.setattr(lazy_images, "_MAX_IMAGES_PER_TASK", 3)
    monkeypatch.setattr(images, "BLOCK_BYTES", 5 * 3 * 8 * 8)


def test_stop_names_broken_images_of_both_splits_and_writes_nothing(prepare, folder):
    result = prepare(source="folder", path=folder)
    assert result.exit_code == 1
    splits, error = result.output.splitlines()
    assert splits == f"{folder}: train/ is the training split, test/ the test split"
    assert error.startswith(f"Error: {folder}: 3 images cannot be read: train/a/05.png (is empty), train/b/00.png (")
    assert "test/a/1.png (image file is truncated" in error and "broken_images: skip" in error
    assert list(result.folder.parent.iterdir()) == []


def test_stop_lists_all_broken_images_in_a_file(prepare, folder):
    for number in range(6, 10):
        (folder / f"train/a/{number:02d}.png").write_bytes(b"")
    result = prepare(source="folder", path=folder)
    error = result.output.splitlines()[-1]
    # seven are broken: five in a, one in b, one in test/a; five are named, in order
    assert "7 images cannot be read" in error and "train/a/09.png (is empty) and 2 more" in error
    assert "train/b" not in error
    listing = result.folder.parents[2] / ".pipeline" / "broken-images-probe.txt"
    assert str(listing) in error
    paths = [line.split("\t")[0] for line in listing.read_text().splitlines()]
    assert paths == [*(f"train/a/{number:02d}.png" for number in range(5, 10)), "train/b/00.png", "test/a/1.png"]


@pytest.mark.parametrize("broken_images", ["stop", "skip"])
@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives an I/O error")
def test_system_error_is_not_a_broken_image(prepare, tmp_path, broken_images):
    for name in "ab":
        for number in range(5):
            save_plain(tmp_path / "in" / name / f"{number}.png", (1, number, 0))
    (tmp_path / "in" / "a" / "5.png").symlink_to("/proc/self/mem")  # to read its first byte is an I/O error
    result = prepare(source="folder", path=tmp_path / "in", broken_images=broken_images)
    assert result.exit_code == 1 and "a/5.png cannot be read (Input/output error). Check the disk" in result.output
    assert "broken" not in result.output and not result.folder.exists()


def test_stop_keeps_the_previous_data_set(prepare, folder):
    before = prepare(source="digits").dataset.hash
    result = prepare(source="folder", path=folder)
    assert result.exit_code == 1
    assert prepare(source="digits").dataset.hash == before
    assert [path.name for path in result.folder.parent.iterdir()] == ["probe"]


def test_skip_lists_broken_images_and_keeps_the_index_dense(prepare, folder):
    result = prepare(source="folder", path=folder, broken_images="skip")
    assert "broken images left out: 3, the first is train/a/05.png (is empty)" in result.output
    dataset = result.dataset
    listed = json.loads((dataset.path / "manifest.json").read_text())["skipped"]
    assert [image["path"] for image in listed["train"]] == ["train/a/05.png", "train/b/00.png"]
    assert [image["path"] for image in listed["test"]] == ["test/a/1.png"]
    for image in listed["train"] + listed["test"]:
        assert BROKEN[image["path"]] in image["reason"]
    train, test = dataset.load("train"), dataset.load("test")
    assert train.labels.tolist() == [0] * 19 + [1] * 19
    assert [green for _, green, _ in colours(train.images)] == [*range(5), *range(6, 20), *range(1, 20)]
    assert (dataset.rows("test"), test.labels.tolist()) == (3, [0, 1, 1])


def test_skipping_equals_a_folder_without_the_broken_images(prepare, folder):
    skipped = prepare(source="folder", path=folder, broken_images="skip").folder
    files = {name: (skipped / name).read_bytes() for name in ("train.h5", "test.h5")}
    for path in BROKEN:
        (folder / path).unlink()
    clean = prepare(source="folder", path=folder)
    assert {name: (clean.folder / name).read_bytes() for name in files} == files
    again = {path.name: path.read_bytes() for path in clean.folder.iterdir()}
    moved = folder.rename(folder.with_name("elsewhere"))
    assert {path.name: path.read_bytes() for path in prepare(source="folder", path=moved).folder.iterdir()} == again


def test_split_without_readable_images_is_reported(prepare, folder):
    for path in (folder / "test").glob("*/*"):
        path.write_bytes(b"")
    result = prepare(source="folder", path=folder, broken_images="skip")
    assert "The test split has no readable image; the first is test/a/0.png (is empty)" in result.output


def test_broken_image_outside_the_subset_is_ignored(prepare, folder):
    (folder / "test/a/1.png").unlink()
    save_plain(folder / "train/b/00.png", (1, 0, 0))
    chosen = None
    for count in range(2, 12):  # the class shares are drawn by the seed: one of these leaves a/05 out
        result = prepare(source="folder", path=folder, train_subset=count)
        if result.exit_code == 0:
            chosen = result.dataset.load("train")
            break
    assert chosen is not None and 5 not in [green for red, green, _ in colours(chosen.images) if red == 0]


def test_names_that_are_not_utf8(prepare, folder):
    bad = os.fsdecode(b"\xff\xfe.png")
    (folder / "train" / "a" / bad).write_bytes(b"")
    dataset = prepare(source="folder", path=folder, broken_images="skip").dataset
    assert "train/a/\\xff\\xfe.png" in [image.path for image in dataset.manifest.skipped["train"]]
    shutil.copytree(folder / "train" / "a", folder / "train" / os.fsdecode(b"\xff"))
    shutil.copytree(folder / "train" / "a", folder / "test" / os.fsdecode(b"\xff"))
    assert "name is not UTF-8 (" in prepare(source="folder", path=folder).output


def test_order_does_not_depend_on_reading_speed(prepare, tmp_path):
    # the first images are large and slow, the later ones small
    for number in range(30):
        for half in ("train", "test"):
            save_plain(
                tmp_path / "mix" / half / "a" / f"{number:02d}.png", (number, 0, 0), (600 if number < 5 else 8,) * 2
            )
    data = prepare(source="folder", path=tmp_path / "mix").dataset.load("train")
    assert [red for red, _, _ in colours(data.images)] == list(range(30))


def test_circular_link_and_folder_named_like_an_image(prepare, tmp_path):
    root = tmp_path / "odd"
    save_plain(root / "a" / "x.png" / "0.png", (1, 2, 3))
    save_plain(root / "a" / "1.png", (1, 2, 3))
    (root / "a" / "gone.png").symlink_to("nowhere.png")
    dataset = prepare(source="folder", path=root, broken_images="skip").dataset
    assert dataset.rows("train") + dataset.rows("test") == 2
    assert [image.reason for images in dataset.manifest.skipped.values() for image in images] == [
        "No such file or directory"
    ]


def test_digits_hash_is_unchanged(prepare):
    """Guard of a data set that results were published with: golden, from its first preparation at 32 pixels."""
    dataset = prepare(source="digits", image_size=32).dataset
    train, test = (dataset.manifest.splits[split].sha256 for split in ("train", "test"))
    assert train == "8616712fa2628e992df701fe29432d2bf9632bcf86cfa3438768b88ba8880a90"
    assert test == "c7e91bcee82a6ca123a3f4c8bb751565a78a6fb27cfcab73bbe332cf4e89dcdb"


def test_digits_by_hand(prepare):
    dataset = prepare(source="digits", image_size=8).dataset  # its own size: not resized
    bunch = load_digits()
    table = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(bunch.images, bunch.target, strict=True)
    }
    for split, rows in (("train", 1438), ("test", 359)):
        data = dataset.load(split)
        assert len(data) == rows
        for image, label in zip(data.images, data.labels, strict=True):
            assert table[np.ascontiguousarray(image[..., 0]).tobytes()] == label
            assert (image == image[..., :1]).all()
    assert dataset.class_names[7] == "handwritten number 7"


def test_pipe_named_like_an_image_does_not_block(prepare, folder):
    os.mkfifo(folder / "train" / "a" / "00-pipe.jpg")
    assert "train/a/00-pipe.jpg (is not a file)" in prepare(source="folder", path=folder).output
