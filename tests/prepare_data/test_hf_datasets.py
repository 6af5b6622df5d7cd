"""Hugging Face data sets: folders of save_to_disk, and a hub on loopback."""

import json

import pytest

from tests.conftest import invoke
from tests.prepare_backbone.hub_server import COMMIT, serving
from tests.prepare_data.image_files import colours
from tests.prepare_data.large_files import png, table, write_arrow, write_parquet

IMAGES, LABELS = [png(number) for number in range(10)], [number % 2 for number in range(10)]
TABLE = table(IMAGES, LABELS, ["a", "b"])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose org/name has training, validation and test files, and org/two two configurations."""
    root = tmp_path / "hub" / "datasets" / "org"
    for split in ("train", "validation", "test"):
        rows = TABLE.slice(0, {"validation": 5, "test": 7}.get(split))  # a hub keeps equal files once
        write_parquet(root / "name" / "data" / f"{split}-00000-of-00001.parquet", rows)
    (root / "name" / "README.md").write_text("x")
    for name in ("coarse", "fine"):
        write_parquet(root / "two" / name / "train-00000-of-00001.parquet", TABLE)
    write_parquet(root / "scripted" / "x.csv", TABLE)
    with serving(tmp_path / "hub", tmp_path / "cache", monkeypatch) as server:
        yield server


def fetched(hub):
    return [name for name, _ in hub.sent if name.endswith(".parquet")]


@pytest.mark.parametrize("address", ["org/name@{}", "{{url}}/datasets/org/name/tree/{}", "datasets/org/name@{}/data"])
def test_data_set_of_the_hub(prepare, hub, address):
    dataset = prepare(source="hf-dataset", path=address.format(COMMIT).replace("{url}", hub.url)).dataset
    assert colours(dataset.load("train").images) == [(number, 0, 0) for number in range(10)]
    assert dataset.class_names == ["a", "b"]
    assert fetched(hub) == ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"]
    origin = json.loads((dataset.path / "manifest.json").read_text())["origin"]
    assert (origin["repository"], origin["revision"]) == ("org/name", COMMIT)
    assert origin["files"]["test"] == ["data/test-00000-of-00001.parquet"]


def test_files_are_fetched_once_and_compared_with_the_hub(prepare, hub, tmp_path):
    first = prepare(source="hf-dataset", path=f"org/name@{COMMIT}").dataset.hash
    assert prepare(source="hf-dataset", path=f"org/name@{COMMIT}").dataset.hash == first and len(fetched(hub)) == 2
    blob = next((tmp_path / "cache").glob("datasets--org--name/blobs/*"))
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])
    assert prepare(source="hf-dataset", path=f"org/name@{COMMIT}").dataset.hash == first and len(fetched(hub)) == 3


@pytest.mark.parametrize("address", ["org/name", "org/name@main"])
def test_branch_is_refused_with_its_commit(prepare, hub, address):
    result = prepare(source="hf-dataset", path=address)
    assert result.exit_code == 1 and f"main is now at {COMMIT}" in result.output
    assert "Write it after the id in prepare_data.path, as organisation/name@COMMIT" in result.output


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            f"org/two@{COMMIT}",
            "holds several data sets, in the folders coarse, fine. Set prepare_data.path to one of them",
        ),
        (f"org/none@{COMMIT}", "The hub has no data set org/none, or it is private"),
        (f"org/name@{'d' * 40}", "org/name has no revision dddd"),
        (
            f"org/scripted@{COMMIT}",
            "has no Parquet files (others: .csv). Correct the path, or use the commit of the branch",
        ),
        (f"org/name@{COMMIT}/other", "has no Parquet files in other"),
        ("name", "is neither a folder nor a data set's id on the hub"),
        ("./name", "name does not exist. Set prepare_data.path to a folder that save_to_disk wrote, or to the address"),
        ("name.parquet", "is a single file that does not exist here"),
    ],
)
def test_wrong_address(prepare, hub, address, message):
    result = prepare(source="hf-dataset", path=address)
    assert result.exit_code == 1 and message in result.output and fetched(hub) == []


@pytest.mark.parametrize(("folder", "test"), [("two", "fine"), ("name", "data/{train,validation}-*.parquet")])
def test_folder_or_pattern_in_the_repository(prepare, hub, folder, test):
    dataset = prepare(source="hf-dataset", path=f"org/{folder}@{COMMIT}/{test}").dataset
    assert dataset.rows("train") == (8 if folder == "two" else 10)
    assert not any("test-" in name or "coarse" in name for name in fetched(hub))


def test_gated_data_set(prepare, hub):
    hub.faults = {"gated": 401}
    result = prepare(source="hf-dataset", path=f"org/name@{COMMIT}")
    assert f"org/name is gated. Accept its terms at {hub.url}/datasets/org/name, then log in" in result.output


def saved(root, splits):
    for split in splits:
        write_arrow(root / split, TABLE)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return root


def test_other_splits_of_a_dictionary_are_left_out(prepare, tmp_path):
    result = prepare(source="hf-dataset", path=saved(tmp_path / "in", ["train", "test", "unsupervised"]))
    assert "splits left out: unsupervised" in result.output and result.dataset.rows("test") == 10


@pytest.mark.parametrize("names", [["a", "b"], ["test", "validation"], ["train", "val", "validation"]])
def test_dictionary_without_clear_splits(prepare, tmp_path, names):
    result = prepare(source="hf-dataset", path=saved(tmp_path / "in", names))
    assert result.exit_code == 1
    assert f"needs one split for training, and one to test (splits: {', '.join(names)}). Rename" in result.output


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "state.json cannot be read ("),
        ("[]", "state.json is not a JSON object. Save the data set again."),
        ('{"_data_files": []}', "state.json lists no files of a data set. Save the data set again."),
        ('{"_data_files": [{"filename": "../../x.arrow"}]}', "state.json lists no files of a data set."),
        ('{"_data_files": [{"filename": "x.arrow"}]}', "x.arrow is missing. Get the complete data set"),
        (
            '{"_data_files": [{"filename": "data-00000-of-00002.arrow"}], "_indices_data_files": [{}]}',
            "of an old version",
        ),
    ],
)
def test_wrong_state(prepare, tmp_path, state, message):
    write_arrow(tmp_path / "in", TABLE)
    (tmp_path / "in" / "state.json").write_text(state)
    result = prepare(source="hf-dataset", path=tmp_path / "in")
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output


def test_help_names_the_sources(tmp_path, prepare):
    output = invoke(tmp_path / "project", "prepare-data", "--help").output
    assert all(name in output for name in ("webdataset", "parquet", "hf-dataset", "organisation/name@commit"))
