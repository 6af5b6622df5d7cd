"""Damage to a prepared data set: each kind is reported in one line, and no damaged image is returned."""

import json
import shutil

import h5py
import numpy as np
import pytest

from pipeline.data import datasets
from pipeline.data.datasets import Images, PreparedDataset, Source
from pipeline.errors import PipelineError
from tests.conftest import invoke, write_params


def write(path, seed=0):
    rng = np.random.default_rng(seed)
    splits = {
        split: Images.of_one_domain(rng.integers(0, 256, (rows, 8, 8, 3), np.uint8), rng.integers(0, 2, rows))
        for split, rows in (("train", 20), ("test", 5))
    }
    return datasets.write(path, path.name, "made", Source(["a", "b"], splits, "none"))


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "probe")


def flip(file, offset):
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def offset_of(file, name):
    with h5py.File(file) as h5:
        return h5[name].id.get_offset()


def rewrite(file, change):
    with h5py.File(file, "r+") as h5:
        change(h5)


def replace_dataset(name, **options):
    def change(h5):
        values = options.pop("data", h5[name][()])
        del h5[name]
        h5.create_dataset(name, data=values, **options)

    return change


def reshape(shape):
    return lambda h5: replace_dataset("images", data=h5["images"][()].reshape(shape))(h5)


FAULTS = {
    "empty": lambda file: file.write_bytes(b""),
    "one byte": lambda file: file.write_bytes(b"\x89"),
    "foreign": lambda file: file.write_bytes(b"PK\x03\x04" + bytes(5000)),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one byte short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "header only": lambda file: file.write_bytes(file.read_bytes()[:96]),
    "a pixel": lambda file: flip(file, offset_of(file, "images") + 1000),
    "a label": lambda file: flip(file, offset_of(file, "labels")),
    "a domain": lambda file: flip(file, offset_of(file, "domains") + 8 * 19),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "the other split": lambda file: shutil.copy(file.with_name("test.h5"), file),
    "no labels": lambda file: rewrite(file, lambda h5: h5.__delitem__("labels")),
    "no images": lambda file: rewrite(file, lambda h5: h5.move("images", "pictures")),
    "images are a group": lambda file: rewrite(file, lambda h5: (h5.__delitem__("images"), h5.create_group("images"))),
    "compressed": lambda file: rewrite(file, replace_dataset("images", compression="gzip")),
    "another shape": lambda file: rewrite(file, replace_dataset("images", data=np.zeros((20, 4, 8, 3), np.uint8))),
    "the same bytes in another shape": lambda file: rewrite(file, reshape((20, 16, 4, 3))),
    "another type": lambda file: rewrite(file, replace_dataset("images", data=np.zeros((20, 8, 8, 3), np.float32))),
    "labels are text": lambda file: rewrite(file, replace_dataset("labels", data=["a"] * 20)),
    "labels are a table": lambda file: rewrite(file, replace_dataset("labels", data=np.zeros((20, 2), np.int64))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_split_is_reported(path, fault):
    FAULTS[fault](path / "train.h5")
    with pytest.raises(
        PipelineError, match=r"probe/train\.h5 .*Run `pipeline prepare-data` again, or get a good copy with `dvc pull`"
    ) as caught:
        PreparedDataset(path).load("train")
    assert "\n" not in str(caught.value)
    if fault != "the other split":
        PreparedDataset(path).load("test")


def test_any_flipped_bit_of_the_content_is_found(path):
    pristine = (path / "test.h5").read_bytes()
    start = offset_of(path / "test.h5", "images")
    for offset in range(start, start + 5 * 8 * 8 * 3, 37):
        flip(path / "test.h5", offset)
        with pytest.raises(PipelineError, match="does not hold the test images of its manifest"):
            PreparedDataset(path).load("test")
        (path / "test.h5").write_bytes(pristine)
    PreparedDataset(path).load("test")


def test_split_of_another_data_set_is_reported(path, tmp_path):
    other = write(tmp_path / "other", seed=1)
    shutil.copy(other / "train.h5", path / "train.h5")
    with pytest.raises(PipelineError, match="does not hold the train images"):
        PreparedDataset(path).load("train")


def edit(**changes):
    def change(text):
        return json.dumps(json.loads(text) | changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "JSON"),
        (lambda text: text[: len(text) // 2], "JSON"),
        (lambda text: "[]", "should be an object"),
        (lambda text: "null", "should be an object"),
        (lambda text: text.replace('"class_names"', '"classes"'), "class_names"),
        (edit(class_names="ab"), "class_names"),
        (edit(class_names=[]), "class_names"),
        (edit(image_size="8"), "image_size"),
        (edit(splits={}), "splits"),
        (edit(splits={"train": {"rows": -1, "sha256": "0" * 64}}), "splits"),
        (edit(splits=None), "splits"),
        (edit(surprise=1), "surprise"),
    ],
)
def test_damaged_manifest_is_reported(path, change, message):
    manifest = path / "manifest.json"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(PipelineError, match=rf"probe/manifest\.json is not the manifest .*{message}") as caught:
        PreparedDataset(path)
    assert "\n" not in str(caught.value)


def test_manifest_that_is_not_text_or_not_a_file_is_reported(path):
    (path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PipelineError, match="is not the manifest"):
        PreparedDataset(path)
    (path / "manifest.json").unlink()
    with pytest.raises(PipelineError, match="manifest.json is missing"):
        PreparedDataset(path)
    (path / "manifest.json").mkdir()
    with pytest.raises(PipelineError, match="manifest.json cannot be read"):
        PreparedDataset(path)


def test_swapped_class_names_change_the_hash(path):
    before = PreparedDataset(path).hash
    manifest = path / "manifest.json"
    manifest.write_text(edit(class_names=["b", "a"])(manifest.read_text()))
    assert PreparedDataset(path).hash != before


def test_user_sees_one_line(tmp_path):
    write_params(tmp_path, {"prepare_data.train_subset": 20, "prepare_data.image_size": 8})
    write(tmp_path / "data" / "datasets" / "digits")
    FAULTS["half"](tmp_path / "data" / "datasets" / "digits" / "train.h5")
    result = invoke(tmp_path, "train-fl", "--method", "fedavg", "--partition", "dir05", "--seed", "0")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "digits/train.h5 is truncated or corrupt" in result.output
