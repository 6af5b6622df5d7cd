"""The same images as a tree of files, tars, Parquet and save_to_disk; and what the three formats have in common."""

import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.data import decode, lazy_images, split_file
from pipeline.errors import DataError
from pipeline.settings import config
from stages.prepare_data import shard_files, shards, sources
from stages.prepare_data.shards import EncodedImages
from tests.conftest import write_params
from tests.prepare_data.image_files import colours
from tests.prepare_data.large_files import (
    MADE_ELSEWHERE,
    png,
    samples,
    table,
    write_arrow,
    write_parquet,
    write_tar,
)

NAMES = ["cold colour", "warm"]
FORMATS = ["webdataset", "parquet", "hf-dataset"]


def write(kind, root, splits):
    """Write images and labels by split in a format of large files."""
    for split, (images, labels) in splits.items():
        if kind == "webdataset":
            members = {}
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                members |= {f"n{label}/{number:02d}.jpg": image, f"n{label}/{number:02d}.cls": str(label)}
            write_tar(root / f"some-{split}-000.tar", members)
            (root / "classnames.txt").write_text("\n".join(NAMES))
        elif kind == "parquet":
            write_parquet(root / "data" / f"{split}-00000-of-00001.parquet", table(images, labels, NAMES))
        else:
            write_arrow(root / split, table(images, labels, NAMES))
            (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return root


@pytest.fixture
def tree(tmp_path):
    """Class folders with images of several formats, modes and sizes; and the same bytes and labels by split."""
    root, splits = tmp_path / "tree", {}
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
    made = {"0.png": Image.fromarray(pixels), "1.png": Image.fromarray(pixels[..., 0]),
            "2.jpg": Image.fromarray(pixels).convert("CMYK"), "3.gif": Image.fromarray(pixels).convert("P"),
            "4.webp": Image.fromarray(pixels[:8, :8])}  # fmt: skip
    for split in ("train", "test"):
        contents, labels = [], []
        for label, name in enumerate(("cold_colour", "warm")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for file, image in made.items():
                image.rotate(90 * label, expand=True).save(folder / file)
                contents.append((folder / file).read_bytes())
                labels.append(label)
        splits[split] = contents, labels
    return root, splits


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_images_labels_and_names(prepare, tree, tmp_path, kind):
    root, splits = tree
    expected = prepare(source="folder", path=root).dataset
    hashes = [expected.file_hashes(split).tolist() for split in ("train", "test")]
    found = prepare(source=kind, path=write(kind, tmp_path / "large", splits)).dataset
    assert found.class_names == NAMES and found.hash == expected.hash
    assert [found.file_hashes(split).tolist() for split in ("train", "test")] == hashes
    assert found.manifest.source == kind and found.manifest.origin.repository is None
    assert all(found.manifest.origin.files[split] for split in ("train", "test"))


@pytest.mark.parametrize("kind", FORMATS)
def test_files_of_other_programs_are_read(prepare, kind):
    path = MADE_ELSEWHERE / {"hf-dataset": "save_to_disk"}.get(kind, kind)
    dataset = prepare(source=kind, path=path).dataset
    train, test = dataset.load("train"), dataset.load("test")
    assert colours(train.images) == [(number, 0, 0) for number in range(10)]
    assert train.labels.tolist() == [0, 1] * 5 and dataset.class_names == ["a", "b"]
    assert colours(test.images) == [(3, 0, 0), (1, 0, 0), (2, 0, 0)] and test.labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize("kind", FORMATS)
def test_broken_images_are_named(prepare, tmp_path, kind):
    good, broken = png(1), b"404"
    path = write(kind, tmp_path / "in", {"train": ([good, broken, good, b""], [0, 1, 1, 0]), "test": ([good], [0])})
    name, other = {
        "webdataset": ("some-train-000.tar/n1/01.jpg", "some-train-000.tar/n0/03.jpg"),
        "parquet": ("data/train-00000-of-00001.parquet, row 1", "data/train-00000-of-00001.parquet, row 3"),
        "hf-dataset": ("train/data-00000-of-00002.arrow, row 1", "train/data-00001-of-00002.arrow, row 1"),
    }[kind]
    result = prepare(source=kind, path=path)
    assert f"2 images cannot be read: {name} (is not of a known image format), {other} (is empty)" in result.output
    dataset = prepare(source=kind, path=path, broken_images="skip").dataset
    assert [one.path for one in dataset.manifest.skipped["train"]] == [name, other]
    assert dataset.load("train").labels.tolist() == [0, 1]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_subset_decodes_its_own_images_only(prepare, tmp_path, monkeypatch, kind):
    images, labels = [png(number) for number in range(30)], [number % 2 for number in range(30)]
    path = write(kind, tmp_path / "in", {"train": (images, labels), "test": ([png(99)], [0])})
    decoded = []

    def counted(content, *arguments):
        decoded.append(content)
        return decode.decode_hashed(content, *arguments)

    monkeypatch.setattr(shards, "decode_hashed", counted)
    train = prepare(source=kind, path=path, train_subset=6).dataset.load("train")
    assert len(decoded) == 6 + 1 and train.labels.tolist().count(0) == 3
    assert [red % 2 for red, _, _ in colours(train.images)] == train.labels.tolist()


@pytest.mark.parametrize("kind", FORMATS)
def test_test_split_is_drawn_if_there_is_none(prepare, tmp_path, kind):
    images, labels = [png(number) for number in range(20)], [0] * 10 + [1] * 10
    result = prepare(source=kind, path=write(kind, tmp_path / "in", {"train": (images, labels)}))
    assert "no test files; one image in five, stratified by class, is the test split" in result.output
    dataset = result.dataset
    assert dataset.load("test").labels.tolist() == [0, 0, 1, 1]  # a fifth of ten of each class
    seen = [red for split in ("train", "test") for red, _, _ in colours(dataset.load(split).images)]
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("kind", FORMATS)
def test_validation_is_the_test_split_if_no_test_image_has_a_label(prepare, tmp_path, kind):
    one = [png(1), png(2)]
    splits = {"train": (one, [0, 1]), "validation": ([png(5)], [1]), "test": (one, [-1, -1])}
    result = prepare(source=kind, path=write(kind, tmp_path / "in", splits))
    assert "the test images have no labels, so the validation files are the test split" in result.output
    assert colours(result.dataset.load("test").images) == [(5, 0, 0)]
    splits["test"] = one, [0, -1]
    result = prepare(source=kind, path=write(kind, tmp_path / "in", splits))
    assert result.exit_code == 1 and "an image has no label, such as " in result.output
    splits["test"] = one, [0, 1]
    result = prepare(source=kind, path=write(kind, tmp_path / "in", splits))
    assert "the test files are the test split; the validation files are left out" in result.output


@pytest.mark.parametrize("kind", FORMATS)
def test_label_beyond_the_class_names(prepare, tmp_path, kind):
    path = write(kind, tmp_path / "in", {"train": ([png(1), png(2)], [0, 2]), "test": ([png(1)], [0])})
    result = prepare(source=kind, path=path)
    assert result.exit_code == 1
    assert "has the label 2, which is beyond the 2 class names. Correct the labels" in result.output


@pytest.mark.parametrize("kind", FORMATS)
def test_few_large_images_wait_in_memory(tmp_path, monkeypatch, kind):
    images = [png(number) for number in range(1, 10)]
    write(kind, tmp_path / "in", {"train": (images, [0] * 9), "test": (images[:1], [0])})
    monkeypatch.setattr(lazy_images, "_BYTES_PER_TASK", 3 * min(map(len, images)))
    params = config.load(write_params(tmp_path, {"prepare_data.image_size": 8})).params.prepare_data
    train = sources.SOURCES[kind](tmp_path / "in", params).splits["train"]
    assert [len(block.rows) for block in train.blocks()] == [3, 3, 3]
    assert colours(next(train.blocks(start=7)).images) == [(8, 0, 0), (9, 0, 0)]


@pytest.mark.parametrize("kind", FORMATS)
def test_interrupt_in_the_test_split(prepare, tmp_path, monkeypatch, kind):
    path = write(kind, tmp_path / "in", {"train": ([png(1), png(2)], [0, 1]), "test": ([png(3), png(4)], [0, 1])})
    monkeypatch.setattr(split_file, "SECONDS_BETWEEN_SAVES", 0.0)

    def interrupted(content, *arguments):
        if content == png(3):
            raise KeyboardInterrupt
        return decode.decode_hashed(content, *arguments)

    with monkeypatch.context() as once:
        once.setattr(shards, "decode_hashed", interrupted)
        result = prepare(source=kind, path=path)
    assert result.exit_code == 130
    assert "Interrupted: completed work is kept; run the command again to resume." in result.output
    result = prepare(source=kind, path=path)
    assert "train: continuing after 2 of 2 images" in result.output
    assert colours(result.dataset.load("test").images) == [(3, 0, 0), (4, 0, 0)]


@pytest.mark.parametrize("kind", FORMATS)
def test_another_image_column_has_another_identity(tmp_path, kind):
    left, right = [png(1), png(2)], [png(3), png(4)]
    if kind == "webdataset":
        members = {"a.left.png": left[0], "a.right.png": right[0], "a.cls": "0"}
        write_tar(tmp_path / "in" / "train.tar", members)
    else:
        both = table(left, [0, 1]).rename_columns(["left.png", "label"]).append_column("right.png", pa.array(right))
        if kind == "parquet":
            write_parquet(tmp_path / "in" / "train.parquet", both)
        else:
            write_arrow(tmp_path / "in", both)
    identities = []
    for column in ("left.png", "right.png", "left.png"):
        keys = {"prepare_data.image_size": 8, "prepare_data.image_column": column}
        params = config.load(write_params(tmp_path, keys)).params.prepare_data
        identities.append(sources.SOURCES[kind](tmp_path / "in", params).splits["train"].identity())
    assert identities[0] == identities[2] != identities[1]


def test_changed_file_has_another_identity(tmp_path):
    path = write_tar(tmp_path / "x.tar", samples([0, 1]))
    before = EncodedImages(tmp_path, ["x.tar"], 8).identity()
    write_tar(path, samples([0, 1, 1] * 4))
    assert EncodedImages(tmp_path, ["x.tar"], 8).identity() != before


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{a,b}-{08..10}", ["a-08", "a-09", "a-10", "b-08", "b-09", "b-10"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{9..10}.tar", ["9.tar", "10.tar"]),
    ],
)  # fmt: skip
def test_braces_are_written_out(pattern, expected):
    assert shard_files.expanded(pattern) == expected


@pytest.mark.parametrize("pattern", ["{0..1000000}.tar", "{0..1000}-{1..1000}.tar"])
def test_too_many_files_of_a_pattern(pattern):
    with pytest.raises(DataError, match=r"names more than 1,000,000 files. Correct its braces."):
        shard_files.expanded(pattern)


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{0..1}.tar", "?rain-0.tar", "*/train-[01].tar"])
def test_folders_that_exist_are_no_patterns(tmp_path, pattern):
    path = write_tar(tmp_path / "[x]{y}" / "z" / "train-0.tar", {})
    write_tar(path.with_name("train-1.tar"), {})
    start = tmp_path / "[x]{y}" if "/" in pattern else path.parent
    expected = ["train-0.tar"] if pattern.startswith("?") else ["train-0.tar", "train-1.tar"]
    assert shard_files.find(start / pattern, (".tar",)) == (path.parent, expected)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["imagenet-train-000.tar", "imagenet-val-000.tar"], ["train", "validation"]),
        (["train/0.tar", "test/0.tar"], ["train", "test"]),
        (["Training/dev-kit/0.tar", "0_Test.tar"], ["validation", "test"]),  # the word nearest to the file
        (["data/train-00000-of-00001-0123abcd.parquet"], ["train"]),
        (["default/partial-train/0000.parquet"], ["train"]),
        (["0.tar", "trains.tar"], ["all", "all"]),
    ],
)
def test_words_tell_splits(names, expected):
    assert [shard_files._split_of("x", name)[0] for name in names] == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-test-0.tar"], "the name train-test-0.tar tells several splits (test, train). Rename the file."),
        (
            ["train-0.tar", "extra.tar"],
            "beside files whose names tell no split (extra.tar). Set prepare_data",
        ),
        (["test-0.tar", "val/1.tar"], "holds test and validation files (test-0.tar), but no training files. Add files"),
    ],
)
def test_ambiguous_names_are_refused(prepare, tmp_path, names, message):
    for name in names:
        write_tar(tmp_path / "in" / name, samples([0]))
    result = prepare(source="webdataset", path=tmp_path / "in")
    assert result.exit_code == 1 and message in result.output


def test_pattern_chooses_files_and_names_a_missing_one(prepare, tmp_path):
    for number in range(3):
        write_tar(tmp_path / "train" / f"{number:02d}.tar", samples([0, 1] * 5, first=10 * number))
    dataset = prepare(source="webdataset", path=tmp_path / "train" / "{00..01}.tar").dataset
    assert dataset.manifest.origin.files["train"] == ["00.tar", "01.tar"]
    assert dataset.rows("train") + dataset.rows("test") == 20
    assert prepare(source="webdataset", path=tmp_path / "*" / "0[02].tar").dataset.rows("train") == 16
    result = prepare(source="webdataset", path=tmp_path / "train" / "{00..03}.tar")
    assert result.exit_code == 1 and "train/03.tar does not exist. Get it, or change prepare_data.path" in result.output
    result = prepare(source="webdataset", path=tmp_path / "train" / "*.taz")
    assert result.exit_code == 1 and "No file matches" in result.output


@pytest.mark.parametrize("source", ["webdataset", "parquet"])
def test_link_to_a_folder_above_is_not_followed(tmp_path, source):
    ending = {"webdataset": ".tar", "parquet": ".parquet"}[source]
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / f"x{ending}").touch()
    (tmp_path / "in" / "a" / "loop").symlink_to(".")
    (tmp_path / "in" / "b").symlink_to("a")
    (tmp_path / "in" / "itself").symlink_to("itself")
    assert shard_files.find(tmp_path / "in", (ending,))[1] == [f"a/x{ending}", f"b/x{ending}"]


@pytest.mark.parametrize(
    ("source", "make", "message"),
    [
        ("webdataset", lambda root: None, "in does not exist. Set prepare_data.path to a folder, or a pattern"),
        ("parquet", lambda root: root.mkdir(), "in has no files that end in .parquet. Set prepare_data.path to them."),
        ("webdataset", lambda root: root.write_bytes(b"x"), "in does not end in .tar. Change the pattern."),
        ("hf-dataset", lambda root: root.mkdir(), "in has neither state.json nor dataset_dict.json"),
    ],
)  # fmt: skip
def test_missing_files(prepare, tmp_path, source, make, message):
    make(tmp_path / "in")
    result = prepare(source=source, path=tmp_path / "in")
    assert result.exit_code == 1 and message in result.output


def test_pointer_of_git_lfs(prepare, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    result = prepare(source="parquet", path=tmp_path / "in")
    assert result.exit_code == 1 and "is a git-lfs pointer, not the data. Run `git lfs pull`" in result.output


def test_columns_of_another_source_cause_a_warning(prepare):
    result = prepare(source="digits", label_column="x")
    assert "image_column and label_column are not used by the source digits" in result.output
