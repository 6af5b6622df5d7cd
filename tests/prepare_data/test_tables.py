"""Parquet and Arrow tables of images: columns, rows, damaged files."""

import json
import sys

import pyarrow as pa
import pytest

from tests.prepare_data.image_files import colours
from tests.prepare_data.large_files import png, table, write_arrow, write_parquet

IMAGES = [png(number) for number in range(10)]
LABELS = [number % 2 for number in range(10)]


@pytest.fixture
def prepared(prepare, tmp_path):
    """Prepare Parquet files of this table, and of the same one to test."""

    def run(content, test=None, **keys):
        write_parquet(tmp_path / "in" / "train.parquet", content)
        write_parquet(tmp_path / "in" / "test.parquet", content if test is None else test)
        return prepare(source="parquet", path=tmp_path / "in", **keys)

    return run


def with_columns(**columns):
    made = table(IMAGES, LABELS)
    for name, values in columns.items():
        made = made.append_column(name, pa.array(values))
    return made


def described(made, **features):
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_names_as_labels(prepared):
    dataset = prepared(table(IMAGES[:3], ["zebra", "ant", "zebra"])).dataset
    assert dataset.class_names == ["ant", "zebra"] and dataset.load("train").labels.tolist() == [1, 0, 1]


def test_image_column_of_plain_bytes(prepared):
    made = pa.table(
        {"img": pa.array(IMAGES, pa.binary()), "mask": pa.array(IMAGES, pa.large_binary()), "label": LABELS}
    )
    assert colours(prepared(made).dataset.load("train").images)[3] == (3, 0, 0)
    made = made.rename_columns(["a", "b", "label"])
    result = prepared(made)
    assert result.exit_code == 1 and "has several image columns (a, b). Set prepare_data.image_column" in result.output
    assert prepared(made, image_column="b").exit_code == 0


def test_class_labels_come_before_other_columns(prepared):
    made = with_columns(fine=[1 - label for label in LABELS])
    dataset = prepared(described(made, fine={"_type": "ClassLabel", "names": ["x", "y"]})).dataset
    assert dataset.class_names == ["x", "y"] and dataset.load("train").labels.tolist() == [1, 0] * 5
    both = described(
        made, fine={"_type": "ClassLabel", "names": ["x", "y"]}, label={"_type": "ClassLabel", "names": ["p", "q"]}
    )
    result = prepared(both)
    assert (
        result.exit_code == 1 and "has several label columns (label, fine). Set prepare_data.label_col" in result.output
    )
    assert prepared(both, label_column="label").dataset.class_names == ["p", "q"]


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (with_columns(), {"label_column": "x"}, "train.parquet has no label column x. Set prepare_data.label_column to "
         "one of: label."),
        (pa.table({"image": pa.array(IMAGES), "n": LABELS}), {}, "has no column that is known to be the label. Set "
         "prepare_data.label_column to one of: n."),
        (pa.table({"label": LABELS}), {}, "has no column of embedded images. Add one."),
        (pa.table({"image": pa.array(IMAGES), "score": [0.5] * len(IMAGES)}), {}, "has no column of names or whole "
         "numbers, which labels are. Add one."),
        (table(IMAGES[:2], [0, None]), {}, "an image has no label, such as "
         "train.parquet, row 1. Add it"),
        (table(IMAGES[:1], [0]).set_column(1, "label", pa.array([2**63], pa.uint64())), {}, f"has the label {2**63}, "
         "which is too large for a class (train.parquet, row 0). Correct the labels."),
        (table(IMAGES[:1], [0]).set_column(1, "label", pa.array([b"\xff"]).view(pa.string())), {}, "train.parquet has "
         "labels or column names that are not UTF-8. Write them as UTF-8."),
        (table(IMAGES, LABELS).slice(0, 0), {}, "the train files (train.parquet) have no images. Add some."),
    ],
)  # fmt: skip
def test_wrong_tables(prepared, content, keys, message):
    result = prepared(content, **keys)
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("train-1.parquet", "train-1.parquet has other class names than train-0.parquet. Write both with the same Cl"),
        ("test-0.parquet", "the test files have other class names than the train files. Write both with the same Cl"),
    ],
)
def test_files_with_different_class_names(prepare, tmp_path, other, message):
    write_parquet(tmp_path / "in" / "train-0.parquet", table(IMAGES, LABELS, ["a", "b"]))
    write_parquet(tmp_path / "in" / other, table(IMAGES, LABELS, ["b", "a"]))
    result = prepare(source="parquet", path=tmp_path / "in")
    assert result.exit_code == 1 and message in result.output


def test_image_without_bytes_is_broken(prepared):
    made = table([*IMAGES[:2], None], [0, 1, 0])
    result = prepared(made, test=table(IMAGES, LABELS))
    assert "train.parquet, row 2 (has no bytes in the table (it is null, or in a file elsewhere))" in result.output
    assert prepared(made, test=table(IMAGES, LABELS), broken_images="skip").dataset.rows("train") == 2


def test_several_configurations(prepare, tmp_path):
    for name in ("coarse", "fine"):
        write_parquet(tmp_path / "in" / name / "train.parquet", table(IMAGES, LABELS))
    result = prepare(source="parquet", path=tmp_path / "in")
    assert "in holds several data sets, in the folders coarse, fine. Set prepare_data.path to one" in result.output
    assert prepare(source="parquet", path=tmp_path / "in" / "fine").dataset.rows("train") == 8
    assert prepare(source="parquet", path=tmp_path / "in" / "*" / "train.parquet").dataset.rows("train") == 16


@pytest.mark.parametrize("source", ["parquet", "hf-dataset"])
@pytest.mark.parametrize("size", ["half", "end", "nothing", "other"])
def test_truncated_file(prepare, tmp_path, source, size):
    if source == "parquet":
        damaged = write_parquet(tmp_path / "in" / "a.parquet", table(IMAGES, LABELS))
    else:
        damaged = write_arrow(tmp_path / "in", table(IMAGES, LABELS)) / "data-00001-of-00002.arrow"
    content = damaged.read_bytes()
    kept = {"half": content[: len(content) // 2], "end": content[:-8], "nothing": b"", "other": b"x" * 1000}[size]
    damaged.write_bytes(kept)
    result = prepare(source=source, path=tmp_path / "in")
    assert result.exit_code == 1 and f"{damaged} is not a complete " in result.output
    assert "Get the complete file." in result.output and "Traceback" not in result.output


def test_arrow_that_points_outside_of_itself_is_refused(prepare, tmp_path):
    file = write_arrow(tmp_path / "in", table(IMAGES, LABELS), rows=100) / "data-00000-of-00002.arrow"
    content = file.read_bytes()
    ends = [len(IMAGES[0]), len(IMAGES[0]) + len(IMAGES[1])]
    offsets = b"".join(place.to_bytes(4, "little") for place in (0, *ends))  # of the images in the bytes of all
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f"))
    result = prepare(source="hf-dataset", path=tmp_path / "in")
    assert result.exit_code == 1 and "data-00000-of-00002.arrow is not a complete Arrow file (" in result.output


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.dictionary(pa.int8(), pa.int8()))])
def test_dictionary_columns_of_arrow_are_refused(prepare, tmp_path, kind):
    made = table(IMAGES, LABELS).append_column("kind", pa.nulls(10, kind))
    result = prepare(source="hf-dataset", path=write_arrow(tmp_path / "in", made))
    assert result.exit_code == 1
    assert "data-00000-of-00002.arrow has dictionary columns (kind), which are not read. Remove" in result.output


def test_missing_pyarrow(prepare, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for source in ("parquet", "hf-dataset"):
        result = prepare(source=source, path=tmp_path)
        assert result.exit_code == 1
        assert "Parquet and Arrow files need the package pyarrow. Run `pip install pyarrow`." in result.output


def test_rows_of_several_groups_are_read_in_order(prepare, tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", table(IMAGES, [0] * 10), rows=3)
    write_parquet(tmp_path / "in" / "b.parquet", table(IMAGES, [0] * 10), rows=100)
    dataset = prepare(source="parquet", path=tmp_path / "in").dataset
    train, test = ([red for red, _, _ in colours(dataset.load(split).images)] for split in ("train", "test"))
    assert sorted(train + test) == sorted([*range(10), *range(10)])
    boundary = next(place for place in range(1, len(train)) if train[place] <= train[place - 1])
    assert train[:boundary] == sorted(train[:boundary]) and train[boundary:] == sorted(train[boundary:])
