"""Ignored files of operating systems and with other endings; small classes; names in both Unicode forms."""

import unicodedata

import pytest
from PIL import Image

from pipeline.data.class_names import differing_in_case, without_words
from pipeline.data.file_names import is_leftover
from tests.prepare_data.image_files import colours, save_plain


def tree(root, classes, per_class=5):
    for position, name in enumerate(classes):
        for number in range(per_class):
            save_plain(root / name / f"{number}.png", (position, number, 7))
    return root


@pytest.mark.parametrize(
    "name",
    ["@eaDir", "__MACOSX", ".ipynb_checkpoints", "._0.png", "Thumbs.db", "THUMBS.DB", "$RECYCLE.BIN", "#recycle",
     "System Volume Information", "lost+found", "desktop.ini", ".DS_Store", ".AppleDouble", "__pycache__", ".git"],
)  # fmt: skip
def test_leftovers_are_neither_classes_nor_images(prepare, tmp_path, name):
    root = tree(tmp_path / "in", ["a", "b"])
    expected = prepare(source="folder", path=root).dataset.hash
    save_plain(root / name / "x" / "0.png", (9, 9, 9))
    save_plain(root / "a" / name / "1.png" / "thumb.png", (9, 9, 9))
    result = prepare(source="folder", path=root)
    assert result.dataset.hash == expected
    assert "files skipped" not in result.output
    domains = tree(tmp_path / "domains" / "d", ["a", "b"]).parent
    save_plain(domains / name / "x" / "0.png", (9, 9, 9))
    assert prepare(source="domain-folder", path=domains).dataset.domain_names == ["d"]


def test_ordinary_names_are_not_leftovers():
    assert not any(map(is_leftover, ("recycling bin", "git", "Thumbs", "@home", "lost", "macosx", "~cat")))


def test_skipped_files_are_counted_by_extension(prepare, tmp_path):
    root = tree(tmp_path / "in", ["a", "b"])
    for name in ("a/1.JXL", "a/2.jxl", "b/3.jxl", "a/README", "b/x.txt", "a/y.b c", "a/Thumbs.db"):
        (root / name).write_bytes(b"x")
    save_plain(root / "loose.png", (1, 2, 3))
    output = prepare(source="folder", path=root).output
    assert "files skipped: .jxl: 3, .txt: 1, no ending: 1, other endings: 1. Convert" in output
    assert "1 images outside the class folders were skipped" in output
    for path in ("train/a/0.png", "test/a/0.png", "1.png", "train/2.png"):
        save_plain(tmp_path / "split" / path, (1, 2, 3))
    assert "2 images outside the class folders were skipped" in prepare(source="folder", path=tmp_path / "split").output


def test_class_without_readable_images_is_rejected_with_counts(prepare, tmp_path):
    root = tree(tmp_path / "in", ["a"])
    (root / "b").mkdir()
    for number in range(3):
        (root / "b" / f"{number}.psd").write_bytes(b"x")
    output = prepare(source="folder", path=root).output
    assert "in/b has no images" in output and "only .psd: 3. Convert" in output


def test_heic_photographs_are_read(prepare, tmp_path):
    pytest.importorskip("pillow_heif")
    root = tree(tmp_path / "in", ["a", "b"])
    for number in range(5):
        Image.new("RGB", (64, 64), (200, 100, 50)).save(root / "a" / f"x{number}.HEIC", format="HEIF", quality=100)
    dataset = prepare(source="folder", path=root).dataset
    read = [colour for split in ("train", "test") for colour in colours(dataset.load(split).images) if colour[0] > 100]
    assert len(read) == 5
    assert all(abs(one - other) <= 4 for colour in read for one, other in zip(colour, (200, 100, 50), strict=True))


def test_an_avif_is_read(prepare, tmp_path):
    root = tree(tmp_path / "in", ["a", "b"])
    Image.new("RGB", (64, 64), (200, 100, 50)).save(root / "a" / "x.avif", quality=100)
    dataset = prepare(source="folder", path=root).dataset
    assert dataset.rows("train") + dataset.rows("test") == 11


NAMES = ["zebra", "éclair", "e", "f", "ábc", "Żółty koń", "猫"]


def test_order_and_hash_do_not_depend_on_the_unicode_form(prepare, tmp_path):
    hashes = set()
    for form in ("NFC", "NFD"):
        for domain in ("ä", "b"):
            for position, name in enumerate(NAMES):
                for number, file in enumerate(("ö", "p", "sub ä/ñ", "sub ä/o", "z")):
                    path = f"{domain}/{name}/{file}.png"
                    save_plain(tmp_path / form / unicodedata.normalize(form, path), (position, number, 7))
        result = prepare(source="domain-folder", path=tmp_path / form)
        hashes.add(result.dataset.hash)
        # by code points of NFC: á U+00E1, é U+00E9, Ż U+017B, 猫 U+732B come after ASCII
        assert result.dataset.class_names == ["e", "f", "zebra", "ábc", "éclair", "Żółty koń", "猫"]
        assert result.dataset.domain_names == ["b", "ä"]
        assert "warn" not in result.output
    assert len(hashes) == 1


def test_two_forms_of_one_name_are_one_class(prepare, tmp_path):
    root = tmp_path / "in"
    for form, number in (("NFC", 0), ("NFD", 1)):
        for half in ("train", "test"):
            save_plain(root / half / unicodedata.normalize(form, "café") / f"{number}.png", (number, 0, 0))
            save_plain(root / half / "tea" / f"{number}.png", (number, 1, 0))
    dataset = prepare(source="folder", path=root).dataset
    assert dataset.class_names == ["café", "tea"]
    assert dataset.load("train").labels.tolist() == [0, 0, 1, 1]
    assert [red for red, _, _ in colours(dataset.load("train").images)] == [0, 1, 0, 1]


def test_small_classes_are_reported_on_one_line_per_kind(prepare, tmp_path):
    root = tmp_path / "in"
    for name, train, test in (("full", 3, 2), ("lone", 1, 0), ("untested", 4, 0), ("untrained", 0, 2), ("none", 0, 0)):
        for half, count in (("train", train), ("test", test)):
            (root / half / name).mkdir(parents=True)
            for number in range(count):
                save_plain(root / half / name / f"{number}.png", (1, 2, number))
    lines = prepare(source="folder", path=root).output.splitlines()
    assert [line for line in lines if line.startswith("classes ")] == [
        "classes without images: none (1 of 5). They stay classes, each with a prompt and an output of the network. "
        "Delete their folders to leave them out",
        "classes with one image: lone (1 of 5)",
        "classes without test images: untested (1 of 5)",
        "classes without training images: untrained (1 of 5)",
    ]


def test_one_class_gives_a_warning(prepare, tmp_path):
    for half in ("train", "test"):
        save_plain(tmp_path / "in" / half / "cat" / "0.png", (1, 2, 3))
    output = prepare(source="folder", path=tmp_path / "in").output
    assert "1 train, 1 test images of one class\n" in output
    assert "all images are of one class, cat: every accuracy will be 100 %" in output


def test_only_empty_class_folders_are_rejected(prepare, tmp_path):
    (tmp_path / "in" / "a" / "@eaDir").mkdir(parents=True)
    result = prepare(source="folder", path=tmp_path / "in")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "has no images in its class folders (a)" in result.output


def test_names_without_words_and_names_that_differ_in_case():
    words = ["7up", "Boeing 747", "number 3", "n0268717", "b2", "class", "no. 5 perfume", "id card"]
    odd = ["n02687172", "7", "007", "class 7", "Label-12", "1990-2000", "3.5", "٣"]
    assert without_words([*words, *odd]) == odd
    assert differing_in_case(["Cat", "dog", "cat", "STRASSE", "straße"]) == ["Cat", "cat", "STRASSE", "straße"]


def test_unusual_names_give_a_warning_with_advice(prepare, tmp_path):
    output = prepare(source="folder", path=tree(tmp_path / "in", ["n02687172", "Cat", "cat"])).output
    assert "mean nothing in a prompt: n02687172 (1 of 3)" in output
    assert "read them as one: Cat, cat" in output
    assert output.count("extract_features.class_prompts") == 2
    assert "class_prompts" not in prepare(source="digits").output
