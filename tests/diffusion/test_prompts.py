"""The prompts of each image."""

import functools
import json

import numpy as np
import pytest

from pipeline.diffusion import prompts
from pipeline.diffusion.prompts import PromptSet
from pipeline.errors import PipelineError
from pipeline.settings.params import ExtractFeatures
from tests.extract_features.fixtures import section

CLASSES = ["cat", "dog"]


def build(root, **changes):
    return prompts.build(section(ExtractFeatures, "extract_features", **changes), CLASSES, lambda name: root / name)


def test_templates_are_filled_in(tmp_path):
    made = build(tmp_path, prompt_templates=["a photo of a {class_name}", "{class_name} in {class_name}"])
    assert made == PromptSet([["a photo of a cat", "cat in cat"], ["a photo of a dog", "dog in dog"]], "label")


@pytest.mark.parametrize("write", [json.dumps, lambda content: "dog: [hound, 'a good dog']\n"])
def test_a_file_overrides_classes(tmp_path, write):
    (tmp_path / "own.yaml").write_text(write({"dog": ["hound", "a good dog"]}))
    assert build(tmp_path, class_prompts="own.yaml").texts == [["a photo of a cat"], ["hound", "a good dog"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cow: moo", "names 'cow', which is not a class of the data set"),
        ("dog: 3", "'dog' needs a text or a list of texts, not 3"),
        ("dog: []", "'dog' needs a text or a list"),
        ("[dog]", "is not a mapping of class names to prompts"),
        ("dog: [", "cannot be read"),
        ("dog: no\n# numbers\n007: a photo", 'line 3: YAML reads the key 007 as a number. Quote it: "007".'),
        (
            "true: a photo\n1e3: b",
            "line 1: YAML reads the key true as true or false \\(and 1 others in the same way\\)",
        ),
        ("null: a photo", "reads the key null as an empty value. Quote it"),
        ("2020-01-01: a photo", "reads the key 2020-01-01 as a date. Quote it"),
    ],
)
def test_prompt_files_are_checked(tmp_path, content, message):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(PipelineError, match=message):
        build(tmp_path, class_prompts="own.yaml")


def test_missing_prompt_file_is_named_once(tmp_path):
    for key in ("class_prompts", "negative_words"):
        with pytest.raises(PipelineError) as error:
            build(tmp_path, prompts="self-supervised" if key == "negative_words" else "class", **{key: "none"})
        assert f"{tmp_path / 'none'} cannot be read (No such file or directory). Set it to a " in str(error.value)


def test_self_supervised_prompts(tmp_path):
    made = build(tmp_path, prompts="self-supervised")
    assert made.positive == "first" and len(made.texts) == 201
    assert made.texts[:2] == [["a photo of a similar object"], ["a photo of a goldfish"]]
    (tmp_path / "words").write_text("sun\n\nmoon\n")
    made = build(tmp_path, prompts="self-supervised", negative_words="words")
    assert made.texts[1:] == [["a photo of a sun"], ["a photo of a moon"]]
    (tmp_path / "words").write_text("sun\nsun\n")
    with pytest.raises(PipelineError, match="has a word twice. Write one word per line"):
        build(tmp_path, prompts="self-supervised", negative_words="words")


def assign(positive, negatives, labels, similarity, index=None):
    made = PromptSet([[str(n)] for n in range(len(similarity))], positive)
    index = np.arange(len(labels)) if index is None else index
    nearest = functools.partial(prompts.nearest, np.array(similarity, float))
    return prompts.assign(made, negatives, np.array(labels), index, nearest, 0)


def test_all_prompts_keep_their_order():
    assert assign("label", "all", [2, 0], np.eye(3)).tolist() == [[0, 1, 2]] * 2
    assert assign("label", 9, [2, 0], np.eye(3)).tolist() == [[0, 1, 2]] * 2


def test_nearest_negatives_by_hand():
    # directions at 0, 10, 90 and 180 degrees, of unequal length; ties go to the smaller number
    directions = np.array([[1, 0], [9.85, 1.74], [0, 0.2], [-3, 0]])
    assert assign("label", 2, [0, 1, 2, 3], directions).tolist() == [[0, 1, 2], [1, 0, 2], [2, 1, 0], [3, 2, 1]]
    assert assign("label", 1, [2], np.eye(3)).tolist() == [[2, 0]]


def test_random_negatives_are_distinct_and_keyed_by_the_image():
    drawn = assign("first", 3, [0] * 50, np.eye(9))
    assert (drawn[:, 0] == 0).all()
    assert all(len(set(row)) == 4 and min(row[1:]) >= 1 for row in drawn.tolist())
    assert {n for row in drawn for n in row} == set(range(9))  # 150 draws of 8 words
    again = assign("first", 3, [0], np.eye(9), index=np.array([7]))
    assert again.tolist() == [drawn[7].tolist()]


@pytest.mark.parametrize("words, fits", [(32_766, True), (32_767, False)])
def test_more_prompts_than_int16_can_number_are_rejected(tmp_path, words, fits):
    # the positive prompt is one more, and 2**15 - 1 = 32,767
    (tmp_path / "words.txt").write_text("\n".join(f"word{number}" for number in range(words)), encoding="utf-8")
    params = section(ExtractFeatures, "extract_features", prompts="self-supervised", negative_words="words.txt")
    if fits:
        assert len(prompts.build(params, [], lambda path: tmp_path / path).texts) == 32_767
    else:
        with pytest.raises(PipelineError, match="32,768 prompts, .* at most 32,767"):
            prompts.build(params, [], lambda path: tmp_path / path)
