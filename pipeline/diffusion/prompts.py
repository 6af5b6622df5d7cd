"""The prompts of each image: one that matches it, and negatives.

- Supervised: a prompt per class, "a photo of a {class}"; the one of the image's class matches. With few classes all
  others are negatives, in class order; with many, the K nearest by text embedding, the hardest to distinguish.
- Self-supervised (labels are not read): "a photo of a similar object" matches every image, and its negatives are
  "a photo of a {word}" for K words drawn per image, by default from Tiny-ImageNet's 200 classes.

A prompt may have several texts, whose embeddings are averaged. Text is encoded once per prompt, never per image.
This module does not import diffusers, because training compares the prompts of a set with its own settings.
"""

import json
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline import seeding
from pipeline.errors import PipelineError
from pipeline.io.system_errors import in_words, refusal
from pipeline.settings import config
from pipeline.settings.params import ExtractFeatures

_TINY_IMAGENET = Path(__file__).parent / "tiny_imagenet.json"  # names of its 200 classes
_FIELD = "{class_name}"
_MOST = int(np.iinfo(np.int16).max)  # a shard's prompt numbers are int16


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a feature set, numbered from 0."""

    texts: list[list[str]]  # of each prompt; their embeddings are averaged
    positive: Literal["label", "first"]  # "label" if the prompt of its label matches an image
    names: list[str] = field(default_factory=list, compare=False)  # class or word per prompt, for messages; or empty


def build(params: ExtractFeatures, class_names: list[str], locate: Callable[[str], Path]) -> PromptSet:
    """Build all prompts that the configuration asks for; `locate` resolves a path of params.yaml (`Config.path`).

    Raise PipelineError if a file of prompts or words is unusable, or there are more prompts than int16 can number.
    """
    prompt_set = _prompts(params, class_names, locate)
    if len(prompt_set.texts) > _MOST:
        raise PipelineError(
            f"extract_features has {len(prompt_set.texts):,} prompts, but a feature set holds at most {_MOST:,}. "
            "Use fewer words or classes."
        )
    return prompt_set


def _prompts(params: ExtractFeatures, class_names: list[str], locate: Callable[[str], Path]) -> PromptSet:
    if params.prompts == "self-supervised":
        words = _read_words(locate(params.negative_words)) if params.negative_words else _tiny_imagenet_words()
        texts = [[params.self_supervised_prompt], *_fill(params.prompt_templates, words)]
        return PromptSet(texts, "first", ["extract_features.self_supervised_prompt", *words])
    texts = _fill(params.prompt_templates, class_names)
    if params.class_prompts:
        for name, own in _read_class_prompts(locate(params.class_prompts), class_names).items():
            texts[class_names.index(name)] = own
    return PromptSet(texts, "label", list(class_names))


def _tiny_imagenet_words() -> list[str]:
    return json.loads(_TINY_IMAGENET.read_text(encoding="utf-8"))


def assign(
    prompts: PromptSet,
    negatives: Literal["all"] | int,
    labels: np.ndarray,
    index: np.ndarray,
    nearest: Callable[[int], np.ndarray],
    seed: int,
) -> np.ndarray:
    """Assign prompts to each image, as numbers in `prompts.texts`; the matching one is always among them.

    Args:
        prompts: All prompts.
        negatives: "all" or K >= 1.
        labels: int64 (n,), not read if the first prompt is the positive one.
        index: int64 (n,), the images' positions in the data set, which key the random draws.
        nearest: Returns the first P prompts by similarity to each prompt; see `nearest`.
        seed: Seed of the draws.

    Returns:
        int16 (n, P). All prompts in their order, or the positive first, then K negatives: the nearest, nearest first,
        ties to the smaller number; or, self-supervised, drawn without repetition.
    """
    total, count = len(prompts.texts), per_image(prompts, negatives)
    if count == total:
        return np.tile(np.arange(total, dtype=np.int16), (len(index), 1))
    if prompts.positive == "label":
        return nearest(count)[labels]
    drawn = np.zeros((len(index), count), np.int16)
    for row, image in enumerate(index):
        rng = seeding.numpy_generator(seed, "negatives", int(image))
        drawn[row, 1:] = 1 + rng.choice(total - 1, count - 1, replace=False)
    return drawn


def per_image(prompts: PromptSet, negatives: Literal["all"] | int) -> int:
    """Return P, the number of prompts that `assign` gives an image."""
    total = len(prompts.texts)
    return total if negatives == "all" else min(negatives + 1, total)


def nearest(similarity: np.ndarray, count: int) -> np.ndarray:
    """Return int16 (K, count): each prompt itself, then those of the highest cosine, ties to the smaller number.

    Args:
        similarity: float (K, E), a text embedding per prompt.
        count: At most K.
    """
    unit = similarity / np.linalg.norm(similarity, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, np.inf)
    return np.argsort(-cosine, axis=1, kind="stable")[:, :count].astype(np.int16)


def _fill(templates: list[str], names: list[str]) -> list[list[str]]:
    return [[template.replace(_FIELD, name) for template in templates] for name in names]


def _read_words(file: Path) -> list[str]:
    try:
        words = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise refusal(error, file) or PipelineError(
            f"extract_features.negative_words: {file} cannot be read ({in_words(error)}). Set it to a text file."
        ) from None
    if not words or len(set(words)) < len(words):
        raise PipelineError(
            f"extract_features.negative_words: {file} is empty or has a word twice. Write one word per line."
        )
    return words


def _read_class_prompts(file: Path, class_names: list[str]) -> dict[str, list[str]]:
    """Read the texts of each class from YAML or JSON (which is YAML): a text, or a list of texts to be averaged."""
    key = f"extract_features.class_prompts: {file}"
    for name, texts in (content := _read_mapping(file, key)).items():
        if name not in class_names:
            raise PipelineError(
                f"{key} names {name!r}, which is not a class of the data set. Use its names ({', '.join(class_names)})."
            )
        content[name] = texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise PipelineError(
                f"{key}: {name!r} needs a text or a list of texts, not {texts!r}. Quote a text that YAML reads as a "
                "number, true, false or null."
            )
    return content


def _read_mapping(file: Path, key: str) -> dict[str, Any]:
    from ruamel.yaml import YAMLError

    try:
        text = file.read_text(encoding="utf-8")
        content = config.parse_yaml(text)
        other = config.non_text_keys(text)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        problem = f"{key} cannot be read ({in_words(error)})"
        raise refusal(error, file) or PipelineError(f"{problem}. Set it to a YAML or JSON file.") from None
    if not isinstance(content, Mapping):
        raise PipelineError(
            f"{key} is not a mapping of class names to prompts. Write a line `name: text` for each class."
        )
    if other:
        line, written, kind = other[0]
        more = f" (and {len(other) - 1} others in the same way)" if len(other) > 1 else ""
        raise PipelineError(f'{key}, line {line}: YAML reads the key {written} as {kind}{more}. Quote it: "{written}".')
    return {
        unicodedata.normalize("NFC", name) if isinstance(name, str) else name: texts for name, texts in content.items()
    }
