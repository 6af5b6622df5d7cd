"""Which folder names are recognised as splits, and which trees are ambiguous."""

import pytest

from tests.prepare_data.image_files import colours, save_plain

RED = {"train": 10, "test": 20, "validation": 30}


def make(root, layout, classes=("bird", "cat")):
    """Folder -> split whose colour its images have; two classes of two images each."""
    for folder, split in layout.items():
        for label, name in enumerate(classes):
            for number in range(2):
                save_plain(root / folder / name / f"{number}.png", (RED[split], label, number))
    return root


def splits_of(dataset):
    """Class names, and the reds and labels of each split."""
    loaded = {split: dataset.load(split) for split in ("train", "test")}
    return dataset.class_names, *([(red, green) for red, green, _ in colours(data.images)] for data in loaded.values())


def expected(test="test"):
    return ["bird", "cat"], *([(RED[split], label) for label in (0, 0, 1, 1)] for split in ("train", test))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "valid"), ("train", "validation"), ("train", "val"), ("train", "dev"), ("Train", "Test"),
        ("training", "testing"), ("TRAINING", "Eval"), ("trn", "tst"), ("training_set", "test_set"),
        ("train-images", "test images"), ("01_train", "02_test"), ("train2017", "val2017"), ("seg_train", "seg_test"),
        ("pets/train", "pets/test"), ("a/b/Training", "a/b/Validation"), ("train/train", "test/test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
    ],
)  # fmt: skip
def test_spellings_of_splits(prepare, tmp_path, train, test):
    result = prepare(source="folder", path=make(tmp_path / "in", {train: "train", test: "test"}))
    assert splits_of(result.dataset) == expected()
    assert "is the training split" in result.output.splitlines()[0]
    assert result.output.count("\n") == 3  # the splits, the numbers, the folder


def test_splits_with_letters_are_not_read_as_classes(prepare, tmp_path):
    names = ("trainA", "trainB", "testA", "testB")
    for number, name in enumerate(names):
        save_plain(tmp_path / "in" / name / "0.png", (number, 2, 3))
    result = prepare(source="folder", path=tmp_path / "in")
    assert result.exit_code == 1
    assert "folders named as splits with a letter (testA, testB, trainA, trainB)" in result.output


def test_validation_split_beside_a_test_split_is_left_out_and_logged(prepare, tmp_path):
    layout = {"train": "train", "test": "test", "Validation": "validation"}
    result = prepare(source="folder", path=make(tmp_path / "in", layout))
    assert splits_of(result.dataset) == expected()
    assert "Validation/ is left out (to train on it too, move its images into train/)" in result.output


def test_validation_split_replaces_a_test_split_without_class_folders(prepare, tmp_path):
    root = make(tmp_path / "in", {"train": "train", "val": "validation"})
    save_plain(root / "test" / "0.png", (1, 2, 3))
    (root / "labels").mkdir()
    (root / "labels" / "all.csv").write_text("no image")
    result = prepare(source="folder", path=root)
    assert splits_of(result.dataset) == expected("validation")
    assert "left out, without class folders: labels, test" in result.output


def test_leftovers_beside_splits_and_around_a_wrapper(prepare, tmp_path):
    root = make(tmp_path / "in", {"pets/train": "train", "pets/dev": "validation"})
    for folder in ("__MACOSX/pets/train/cat", "pets/.ipynb_checkpoints/x", "pets/train/@eaDir/cat", "lost+found/a"):
        save_plain(root / folder / "0.png", (99, 99, 99))
    assert splits_of(prepare(source="folder", path=root).dataset) == expected("validation")


def test_a_class_named_train_among_classes_is_a_class(prepare, tmp_path):
    for name in ("bus", "car", "train"):
        for number in range(5):
            save_plain(tmp_path / "in" / name / f"{number}.png", (1, 2, number))
    assert prepare(source="folder", path=tmp_path / "in").dataset.class_names == ["bus", "car", "train"]


def test_domains_may_spell_their_splits_differently(prepare, tmp_path):
    layout = {"a/train": "train", "a/valid": "test", "b/Training": "train", "b/Testing": "test"}
    result = prepare(source="domain-folder", path=make(tmp_path / "in", layout))
    assert result.dataset.domain_names == ["a", "b"]
    assert "a: train/ is the training split, valid/ the test split" in result.output
    assert "b: Training/ is the training split, Testing/ the test split" in result.output
    for split in ("train", "test"):
        data = result.dataset.load(split)
        assert data.domains.tolist() == [0] * 4 + [1] * 4
        assert {red for red, _, _ in colours(data.images)} == {RED[split]}
    wrapped = make(tmp_path / "wrapped", {f"office/{folder}": split for folder, split in layout.items()})
    assert prepare(source="domain-folder", path=wrapped).dataset.hash == result.dataset.hash


@pytest.mark.parametrize(
    ("source", "layout", "message"),
    [
        ("folder", {"train": "train", "Training": "train", "test": "test"}, "two folders for one split, train"),
        ("folder", {"train": "train", "val": "test", "dev": "test"}, "two folders for one split, validation: dev, val"),
        ("folder", {"train": "train", "test": "test", ".": "test"}, "(test, train) beside other folders with images"),
        ("folder", {"test": "test", "val": "test"}, "none with class folders for the train split"),
        ("folder", {"train": "train"}, "in/train, whose folders are then the classes"),
        ("folder", {"a/train": "train", "a/test": "test", "b/train": "train"}, "If a is a domain, set prepare_data"),
        ("domain-folder", {"train": "train", "test": "test"}, "holds splits (test, train), not domains"),
    ],
)
def test_ambiguous_tree_is_rejected_on_one_line(prepare, tmp_path, source, layout, message):
    result = prepare(source=source, path=make(tmp_path / "in", layout))
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert message in result.output


@pytest.mark.parametrize("halves", [("cat/train", "cat/test"), ("cat/Training", "cat/valid")])
def test_splits_inside_class_folders_are_rejected(prepare, tmp_path, halves):
    for folder in (*halves, "dog"):
        save_plain(tmp_path / "in" / folder / "0.png", (1, 2, 3))
    result = prepare(source="folder", path=tmp_path / "in")
    assert result.exit_code == 1 and "Arrange the tree as <split>/<class>/<image>" in result.output


def test_images_without_class_folders_are_rejected(prepare, tmp_path):
    for split in ("train", "test"):
        save_plain(tmp_path / "in" / split / "0.png", (1, 2, 3))
    result = prepare(source="folder", path=tmp_path / "in")
    assert result.exit_code == 1 and "Images without class folders: test, train" in result.output


def test_one_folder_around_classes_gives_a_warning(prepare, tmp_path):
    result = prepare(source="folder", path=make(tmp_path / "in", {"pets": "train"}))
    assert "in/pets is one class that holds the folders bird, cat" in result.output
    assert "domain-folder" not in result.output
