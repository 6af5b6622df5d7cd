"""Trees of image files: the order of labels, names, domains and splits, and what is wrong with a tree."""

import os
import shutil

import numpy as np
import pytest

from tests.prepare_data.image_files import colours, save_plain


def tree(root, classes, per_class=5, start=0):
    """A colour per image: (class position, image number, 7)."""
    for position, name in enumerate(classes):
        for number in range(per_class):
            save_plain(root / name / f"{number}.png", (start + position, number, 7))


def test_class_folders_in_sorted_order_are_the_labels(prepare, tmp_path):
    # as strings "10" comes before "9": labels and names must agree all the same
    for number in (9, 10, 100):
        for image in range(5):
            save_plain(tmp_path / "in" / f"kind_{number}" / f"{image}.png", (number, image, 0))
    dataset = prepare(source="folder", path=tmp_path / "in").dataset
    assert dataset.class_names == ["kind 10", "kind 100", "kind 9"]
    for split, rows in (("train", 12), ("test", 3)):
        data = dataset.load(split)
        assert len(data) == rows
        for label, (red, _, _) in zip(data.labels, colours(data.images), strict=True):
            assert dataset.class_names[label] == f"kind {red}"


def test_tree_is_read_like_torchvisions_imagefolder(prepare, tmp_path):
    from torchvision.datasets import ImageFolder

    for path in ("b/2.png", "b/10.png", "b/sub/1.png", "a/x.PNG", "a/y.png", "a-b/z.png", "a/sub dir/w.png"):
        for split in ("train", "test"):
            save_plain(tmp_path / "in" / split / path, (sum(path.encode()) % 251, len(path), len(split)))
    data = prepare(source="folder", path=tmp_path / "in").dataset.load("train")
    reference = ImageFolder(str(tmp_path / "in" / "train"))
    assert data.labels.tolist() == reference.targets
    assert np.array_equal(data.images, np.stack([np.asarray(image) for image, _ in reference]))


def test_val_is_the_test_split_if_there_is_no_test(prepare, tmp_path):
    tree(tmp_path / "in" / "train", ["a", "b"], 2)
    tree(tmp_path / "in" / "val", ["a", "b"], 1, start=100)
    dataset = prepare(source="folder", path=tmp_path / "in").dataset
    assert dataset.class_names == ["a", "b"]
    assert colours(dataset.load("test").images) == [(100, 0, 7), (101, 0, 7)]


def test_other_files_and_circular_links_are_skipped(prepare, tmp_path):
    tree(tmp_path / "in", ["a", "b"])
    for name in ("notes.txt", ".DS_Store", "._0.png", "Thumbs.db"):
        (tmp_path / "in" / "a" / name).write_bytes(b"no image")
    (tmp_path / "in" / ".cache").mkdir()
    (tmp_path / "in" / "README.md").write_text("no class")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in" / "a")
    (tmp_path / "in" / "itself").symlink_to("itself")
    dataset = prepare(source="folder", path=tmp_path / "in").dataset
    assert dataset.class_names == ["a", "b"]
    assert dataset.rows("train") + dataset.rows("test") == 10


def test_names_in_any_script_are_normalised(prepare, tmp_path):
    tree(tmp_path / "in", ["cafe\u0301", "猫", "пёс_и_кот"])
    dataset = prepare(source="folder", path=tmp_path / "in").dataset
    assert dataset.class_names == ["caf\u00e9", "пёс и кот", "猫"]


def test_subset_is_stratified_and_nested(prepare, tmp_path):
    tree(tmp_path / "in" / "train", ["a", "b"], 10)
    tree(tmp_path / "in" / "test", ["a", "b"], 1)
    data = prepare(source="folder", path=tmp_path / "in", train_subset=6).dataset.load("train")
    assert np.bincount(data.labels).tolist() == [3, 3]
    result = prepare(source="folder", path=tmp_path / "in", train_subset=21)
    assert (result.exit_code, "train_subset = 21" in result.output) == (1, True)


@pytest.mark.parametrize("halved", [False, True])
def test_domains_are_numbered_by_name_and_share_their_classes(prepare, tmp_path, halved):
    for domain, red in (("webcam", 20), ("amazon", 10), ("dslr_x", 15)):
        for half in ("train", "test") if halved else ("",):
            for position, name in enumerate(("back_pack", "mug")):
                for number in range(5):
                    save_plain(tmp_path / "in" / domain / half / name / f"{number}.png", (red, position, len(half)))
    dataset = prepare(source="domain-folder", path=tmp_path / "in").dataset
    assert dataset.domain_names == ["amazon", "dslr_x", "webcam"]
    assert dataset.class_names == ["back pack", "mug"]
    for split, per_domain in (("train", 10 if halved else 8), ("test", 10 if halved else 2)):
        data = dataset.load(split)
        assert np.bincount(data.domains).tolist() == [per_domain] * 3
        assert [(10, 15, 20)[domain] for domain in data.domains] == [red for red, _, _ in colours(data.images)]
        assert data.labels.tolist() == [green for _, green, _ in colours(data.images)]
        assert not halved or {blue for _, _, blue in colours(data.images)} == {len(split)}


def test_a_subset_of_domains_keeps_their_shares(prepare, tmp_path):
    for domain, per_class in (("big", 20), ("small", 10)):
        tree(tmp_path / "in" / domain / "train", ["a", "b"], per_class)
        tree(tmp_path / "in" / domain / "test", ["a", "b"], 1)
    data = prepare(source="domain-folder", path=tmp_path / "in", train_subset=30).dataset.load("train")
    assert np.bincount(2 * data.domains + data.labels).tolist() == [10, 10, 5, 5]


def test_tree_of_domains_read_as_classes_gives_a_warning(prepare, tmp_path):
    for domain in ("amazon", "dslr"):
        tree(tmp_path / "in" / domain, ["bike", "mug"])
    remark = "holds folders named bike, mug. If the folders are domains, not classes, set prepare_data.source: domain"
    assert remark in prepare(source="folder", path=tmp_path / "in").output
    assert remark not in prepare(source="domain-folder", path=tmp_path / "in").output
    tree(tmp_path / "plain", ["a", "b"])
    assert "domain-folder" not in prepare(source="folder", path=tmp_path / "plain").output


def test_two_folders_with_one_class_name_are_rejected(prepare, tmp_path):
    tree(tmp_path / "in", ["a_b", "a b"])
    result = prepare(source="folder", path=tmp_path / "in")
    assert result.exit_code == 1 and "have the same name ('a b';" in result.output.splitlines()[-1]


def test_digits_five_class_names_are_words(prepare, tmp_path):
    for domain in ("mnist", "syn"):
        tree(tmp_path / "in" / domain, map(str, range(10)), 2)
    dataset = prepare(source="digits-five", path=tmp_path / "in").dataset
    assert dataset.class_names[3] == "number 3"
    assert dataset.domain_names == ["mnist", "syn"]
    shutil.rmtree(tmp_path / "in" / "mnist" / "7")
    shutil.rmtree(tmp_path / "in" / "syn" / "7")
    assert "has class folders other than 0 to 9" in prepare(source="digits-five", path=tmp_path / "in").output


def tiny_imagenet(root):
    """Three classes, wnids.txt out of order; a colour per class: red 1, 2, 3 in the order of the wnids."""
    reds = {"n01443537": 1, "n02085620": 2, "n02125311": 3}
    for wnid, red in reds.items():
        for number in range(2):
            save_plain(root / "train" / wnid / "images" / f"{wnid}_{number}.png", (red, number, 0))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t8\t8\n")
    for number, wnid in enumerate(("n02125311", "n01443537", "n02085620")):
        save_plain(root / "val" / "images" / f"val_{number}.png", (reds[wnid], number, 0))
    lines = ["val_0.png\tn02125311\t0\t1\t2\t3", "val_1.png\tn01443537\t0\t1\t2\t3", "val_2.png\tn02085620\t0\t1\t2\t3"]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "wnids.txt").write_text("n02125311\nn01443537\nn02085620\n")
    words = ["n00001740\tentity", "n01443537\tgoldfish, Carassius auratus", "n02085620\tcougar, Chihuahua"]
    (root / "words.txt").write_text("\n".join([*words, "n02125311\tcougar, puma, catamount"]) + "\n")
    (root / "test" / "images").mkdir(parents=True)


def test_tiny_imagenet_names_are_words_in_label_order(prepare, tmp_path):
    tiny_imagenet(tmp_path / "in")
    dataset = prepare(source="tiny-imagenet", path=tmp_path / "in").dataset
    # labels in the order of sorted wnids, not of wnids.txt; "cougar" is two classes' first word: the next is taken
    assert dataset.class_names == ["goldfish", "Chihuahua", "puma"]
    assert dataset.load("train").labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [red for red, _, _ in colours(dataset.load("train").images)] == [1, 1, 2, 2, 3, 3]
    assert dataset.load("test").labels.tolist() == [2, 0, 1]
    assert [red for red, _, _ in colours(dataset.load("test").images)] == [3, 1, 2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: os.remove(root / "words.txt"), "words.txt is missing"),
        (lambda root: (root / "words.txt").write_text("n01443537\tgoldfish\n"), "no words for n02085620, n02125311"),
        (lambda root: (root / "wnids.txt").write_text("n01443537\n"), "names 'n02125311', which wnids.txt lacks"),
        (lambda root: shutil.rmtree(root / "train" / "n02085620"), "train/n02085620 cannot be read"),
        (
            lambda root: os.remove(root / "val" / "images" / "val_1.png"),
            "an image cannot be read: val/images/val_1.png (No such",
        ),
    ],
)
def test_missing_file_of_tiny_imagenet_is_named(prepare, tmp_path, spoil, message):
    tiny_imagenet(tmp_path / "in")
    spoil(tmp_path / "in")
    result = prepare(source="tiny-imagenet", path=tmp_path / "in")
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1


def spoil_split(root):
    tree(root / "train", ["a", "b"])
    tree(root / "test", ["a", "c"])


def spoil_domain(root):
    tree(root / "amazon", ["bike", "mug"])
    tree(root / "dslr", ["bike"])


def spoil_empty_class(root):
    tree(root, ["a"])
    (root / "b").mkdir()
    (root / "b" / "notes.txt").write_text("no image")


@pytest.mark.parametrize(
    ("source", "make", "message"),
    [
        ("folder", lambda root: None, "in is not a folder. Set prepare_data.path"),
        ("folder", lambda root: root.mkdir(), "in has no folders"),
        ("folder", spoil_split, "train and test differ in their class folders: b, c"),
        ("folder", spoil_empty_class, "in/b has no images"),
        (
            "folder",
            lambda root: tree(root / "train", ["a"]),
            "none with class folders for the test split. Found: train",
        ),
        ("domain-folder", spoil_domain, "in/dslr lacks class folders that other domains have: mug"),
        ("tiny-imagenet", lambda root: root.mkdir(), "Unpack tiny-imagenet-200.zip"),
    ],
)
def test_invalid_tree_is_reported_on_one_line(prepare, tmp_path, source, make, message):
    make(tmp_path / "in")
    result = prepare(source=source, path=tmp_path / "in")
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not result.folder.exists()
