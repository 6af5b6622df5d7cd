"""Prompts that the frozen model cannot distinguish are rejected, regardless of the cause."""

import re

import pytest
import torch

from pipeline.diffusion import backbones, distinct_prompts
from pipeline.diffusion.backbones import Conditioning, text
from pipeline.diffusion.prompted_model import PromptedModel
from pipeline.diffusion.prompts import PromptSet
from pipeline.errors import PipelineError
from tests.extract_features import tiny_models

LONG = "a" * 60  # past the window of 48 tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: build(root / name) for name, build in tiny_models.FAMILIES.items()}


def prompted(path, texts, generic="", names=None, positive="label", dtype=torch.float32):
    names = names or [f"class {number}" for number in range(len(texts))]
    return PromptedModel(backbones.load(path, "auto", "cpu", dtype), PromptSet(texts, positive, names), generic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_texts_that_differ_only_past_the_window_are_rejected(models, name, dtype):
    with pytest.raises(PipelineError, match=r"cannot distinguish 2 classes.*'cat' .*'dog' "):
        prompted(models[name], [[LONG + "cat"], ["a bird"], [LONG + "dog"]], names=["cat", "bird", "dog"], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3"])
def test_short_texts_of_one_letter_are_distinguished(models, name, dtype):
    prompted(models[name], [[letter] for letter in "abcdefghij"], dtype=dtype)


def test_equal_texts_in_different_batches_are_found(models):
    texts = [[f"text {number}"] for number in range(70)]
    texts[66] = texts[3]
    with pytest.raises(PipelineError, match=r"cannot distinguish 2 classes.*'class 3' \('text 3'\), 'class 66'"):
        prompted(models["sd"], texts)


def test_equal_averages_are_found_and_other_orders_are_equal(models):
    with pytest.raises(PipelineError, match="'class 0'.*'class 2'"):
        prompted(models["sd"], [["a", "b"], ["b", "c"], ["b", "a"]])
    prompted(models["sd"], [["a", "b"], ["b", "c"], ["a", "c"]])


def test_many_equal_classes_are_counted_in_one_line(models):
    with pytest.raises(PipelineError, match="cannot distinguish 10 classes.* and 7 more") as error:
        prompted(models["sd"], [["a photo of a digit"]] * 10)
    assert "\n" not in str(error.value)


def test_two_classes_with_the_same_class_of_the_model_are_rejected(models):
    with pytest.raises(PipelineError, match=r"'cat' \('tench'\), 'dog' \('Tinca tinca'\)"):
        prompted(models["dit"], [["tench"], ["Tinca tinca"]], names=["cat", "dog"])


def test_a_negative_that_equals_the_positive_prompt_is_rejected(models):
    with pytest.raises(PipelineError, match="cannot distinguish 2 prompts.*negative_words"):
        prompted(models["sd"], [["a thing"], ["a"], ["a thing"]], positive="first")


def test_a_class_with_the_generic_prompt_is_a_warning(models, caplog):
    text.warn_once.cache_clear()
    prompted(models["sd"], [["a cat"], ["a photo"]], generic="a photo")
    assert [message for message in caplog.messages if "denoise_prompt" in message]
    assert re.search("'class 1' .* gives the model the same input as extract_features.denoise_prompt", caplog.text)


def test_rounding_differences_count_as_equal_and_larger_ones_do_not():
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))

    def equal(second):
        given = torch.stack([states[0], second])
        return list(distinct_prompts._equal(Conditioning({"states": given}, given.flatten(1))))

    assert equal(states[0] * (1 + 1e-6)) == [[0, 1]]
    assert equal(states[0] * (1 + 1e-3)) == []
    assert equal(states[1]) == []
