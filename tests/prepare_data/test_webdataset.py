"""Tars in webdataset's layout: where labels and class names come from, and damaged tars."""

import gzip
import json
import tarfile

import pytest

from stages.prepare_data import labels as labels_module
from tests.prepare_data.image_files import colours
from tests.prepare_data.large_files import png, samples, write_tar

BOTH = samples([0, 1])


@pytest.fixture
def prepared(prepare, tmp_path):
    """Prepare tars of these training members and the samples 0, 1 to test; `files` are beside the tars."""

    def run(members, test=BOTH, files=None, **keys):
        write_tar(tmp_path / "in" / "train" / "0.tar", members)
        write_tar(tmp_path / "in" / "test" / "0.tar", test)
        for name, content in (files or {}).items():
            (tmp_path / "in" / name).write_text(content, encoding="utf-8")
        return prepare(source="webdataset", path=tmp_path / "in", **keys)

    return run


def test_numbers_without_names(prepared):
    dataset = prepared(samples([0, 2, 1])).dataset
    assert dataset.class_names == ["class 0", "class 1", "class 2"]
    assert dataset.load("train").labels.tolist() == [0, 2, 1]


@pytest.mark.parametrize("place", ["classnames.txt", "train/classnames.txt", "../classnames.txt"])
def test_class_names_beside_the_tars(prepared, place):
    dataset = prepared(samples([0, 1]), files={place: "great_white shark\nJapanese spaniel\n\n"}).dataset
    assert dataset.class_names == ["great white shark", "Japanese spaniel"]


def with_text(*texts):
    members = samples([0, 1, 0])
    return members | {f"s{number:03d}.txt": text for number, text in enumerate(texts)}


def ordered(members):
    """Members of a sample next to each other, as webdataset requires."""
    return dict(sorted(members.items()))


def test_class_names_in_text_files(prepared):
    assert prepared(ordered(with_text("cat", "dog", "cat\n"))).dataset.class_names == ["cat", "dog"]


def test_captions_are_no_class_names(prepared):
    assert prepared(ordered(with_text("a cat", "dog", "a black cat"))).dataset.class_names == ["class 0", "dog"]


def test_text_is_the_label_if_there_is_no_other(prepared):
    train = {"a.png": png(1), "a.txt": "zebra", "b.png": png(2), "b.txt": "ant "}
    dataset = prepared(train, test={"c.png": png(3), "c.txt": "zebra"}).dataset
    assert dataset.class_names == ["ant", "zebra"]
    assert dataset.load("train").labels.tolist() == [1, 0] and dataset.load("test").labels.tolist() == [1]


def described(**content):
    return {"a.png": png(1), "a.json": json.dumps(content)}


def test_label_in_json(prepared):
    train = prepared(described(label=1, other=0), test=described(label=0, other="x")).dataset.load("train")
    assert train.labels.tolist() == [1]
    dataset = prepared(described(label=1, kind="b"), test=described(kind="a"), label_column="kind").dataset
    assert dataset.class_names == ["a", "b"] and dataset.load("train").labels.tolist() == [1]


def test_known_names_may_be_labels(prepared):
    train = {"a.png": png(1), "a.cls": "ant", "b.png": png(2), "b.cls": "zebra"}
    dataset = prepared(train, test={"a.png": png(1), "a.cls": "ant"}, files={"classnames.txt": "zebra\nant"}).dataset
    assert dataset.class_names == ["zebra", "ant"] and dataset.load("train").labels.tolist() == [1, 0]


def test_members_that_are_no_samples_are_skipped(prepared):
    extra = {"__meta__/a.json": "{}", "readme": "x", "._s000.png": b"x", "t.json": "{}"}
    result = prepared(extra | samples([0, 1]))
    assert colours(result.dataset.load("train").images) == [(0, 0, 0), (1, 0, 0)]
    assert "samples without an image were skipped: 1" in result.output


def test_image_column_chooses_among_several(prepared):
    members = {"a.left.png": png(1), "a.right.png": png(2), "a.cls": "0"}
    result = prepared(members, test=members)
    assert result.exit_code == 1 and "has no images, only .cls, .left.png, .right.png. Set" in result.output
    dataset = prepared(members, test=members, image_column="right.png").dataset
    assert colours(dataset.load("train").images) == [(2, 0, 0)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (samples([0, None, None]), "2 images have no label, such as train/0.tar/s001. Add it, or leave them out."),
        (samples([0, -1]), "an image has no label, such as train/0.tar/s001."),
        (described(kind=1), "an image has no label, such as train/0.tar/a."),
        (described(label=True), "the sample a has a bool as label in its .json. Set prepare_data.label_column"),
        ({"a.png": png(1), "a.json": "{"}, "the sample a has a .json that cannot be read"),
        ({"a.png": png(1), "a.jpg": png(1), "a.cls": "0"}, "the sample a has several images (png, jpg). Set prepare"),
        ({"a.png": png(1), "a.PNG": png(1)}, "the sample a has two files .png. Give every sample a key of its own."),
        ({"a.png": png(1), "a.cls": "0", "b.png": png(1), "b.cls": "x"}, "labels that are numbers and labels that are"),
        ({"a.png": png(1), "a.cls": "x"}, "numbers and labels that are names (those of the test files are numbers)."),
        (described(label=2**63), f"has the label {2**63}, which is too large for a class (train/0.tar/a). Cor"),
        ({"a.cls": "0"}, "0.tar has no images, only .cls. Set prepare_data.image_column to the ending of the images."),
        ({}, "0.tar has no images, no files. Remove it, or get it again."),
    ],
)  # fmt: skip
def test_wrong_samples(prepared, members, message):
    result = prepared(members)
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output


def test_captions_as_labels_are_refused(prepared, monkeypatch):
    monkeypatch.setattr(labels_module, "_MOST_CLASSES", 2)
    members = {
        f"{name}.{end}": content for name in "abc" for end, content in (("png", png(1)), ("txt", f"caption {name}"))
    }
    result = prepared(members)
    assert result.exit_code == 1 and "more than 2 different labels, such as 'caption c'" in result.output


def test_empty_line_in_class_names(prepared):
    result = prepared(samples([0]), files={"classnames.txt": "a\n\nb\n"})
    assert result.exit_code == 1 and "classnames.txt has an empty line. Write a class name per line" in result.output


# A member is 512 bytes of header and its content in blocks of 512; Python's tarfile fills the tar up to 10,240 bytes.
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:520], "0.tar is truncated in s000.png. Get the complete file."),
        (lambda content: content[: 3 * 512 + 9], "0.tar is not a tar, or is damaged (unexpected end of data). Get"),
        (lambda content: content[: 4 * 512], "0.tar is truncated or damaged at byte 2,048. Get the complete file."),
        (lambda content: content[:1024] + b"\1" * 512 + content[1536:], "is truncated or damaged at byte 1,024"),
        (lambda content: b"", "0.tar is empty. Get the complete file."),
        (lambda content: b"x" * 1024, "0.tar is not a tar, or is damaged ("),
        (gzip.compress, "0.tar is compressed (gzip). Decompress it"),
    ],
)
def test_damaged_tar(prepare, tmp_path, damage, message):
    path = write_tar(tmp_path / "in" / "0.tar", samples([0, 1]))
    path.write_bytes(damage(path.read_bytes()))
    result = prepare(source="webdataset", path=tmp_path / "in")
    assert result.exit_code == 1 and message in result.output


def test_compressed_tar(prepare, tmp_path):
    path = write_tar(tmp_path / "0.tar", samples([0, 1]))
    path.rename(tmp_path / "0.tar.gz")
    result = prepare(source="webdataset", path=tmp_path / "0.tar.gz")
    assert result.exit_code == 1 and "0.tar.gz does not end in .tar. Decompress it." in result.output


def test_sparse_member_is_skipped(prepare, tmp_path):
    path = write_tar(tmp_path / "0.tar", samples([0, 1]))
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("s000.bin")
        info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "1000000"}  # a hole larger than the tar
        tar.addfile(info)
    assert prepare(source="webdataset", path=path).exit_code == 0


def test_long_names_of_pax_and_gnu(prepare, tmp_path):
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        long = "ö" * 120
        members = {f"{long}/a.png": b"404", f"{long}/a.cls": "0", "b.png": png(5), "b.cls": "0"}
        write_tar(tmp_path / "in" / "train.tar", members, format=kind)
        write_tar(tmp_path / "in" / "test.tar", samples([0]), format=kind)
        result = prepare(source="webdataset", path=tmp_path / "in")
        assert f"an image cannot be read: train.tar/{long}/a.png (is not of a known" in result.output
