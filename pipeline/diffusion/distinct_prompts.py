"""Check that the frozen model can tell the prompts of a set apart.

Two classes may share one conditioning: their texts are equal, they differ only past the end of the text encoder's
window, or they name the same class of a class-conditional model. Their features would then be equal to the last bit and
TDCL would contrast a class with itself.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.diffusion.backbones import Conditioning
from pipeline.diffusion.backbones.text import warn_once
from pipeline.diffusion.prompts import PromptSet
from pipeline.errors import PipelineError

_NOISE = 1e-5  # of float32 embeddings, relative: equal tokens in different batches differ by less
_SHOWN = 3
_ROWS = 1024  # compared with all at a time


def check(conditioning: Conditioning, prompts: PromptSet) -> None:
    """Compare the conditioning of all K prompts and the generic one, which comes last.

    Raise PipelineError, which names the classes, if two prompts of the set give the model the same input.
    """
    generic = len(prompts.texts)
    groups = list(_equal(conditioning))
    for group in groups:
        own = [number for number in group if number != generic]
        if len(own) > 1:
            raise PipelineError(_in_words(own, prompts))
    for group in groups:
        warn_once(
            f"The prompt of {_named(group[0], prompts)} gives the model the same input as "
            "extract_features.denoise_prompt. Change one of them."
        )


def _in_words(same: list[int], prompts: PromptSet) -> str:
    named = ", ".join(_named(number, prompts) for number in same[:_SHOWN])
    more = f" and {len(same) - _SHOWN} more" if len(same) > _SHOWN else ""
    what = "classes" if prompts.positive == "label" else "prompts"
    key = "class_prompts" if prompts.positive == "label" else "negative_words"
    return (
        f"The frozen model cannot distinguish {len(same)} {what}, because their prompts give it the same input "
        f"({named}{more}). Give each a text that differs within the text encoder's window (extract_features."
        f"prompt_templates, {key})."
    )


def _named(number: int, prompts: PromptSet) -> str:
    text = prompts.texts[number][0]
    text = text if len(text) <= 80 else f"{text[:40]} ... {text[-40:]}"
    return f"{prompts.names[number]!r} ({text!r})" if prompts.names else repr(text)


def _equal(conditioning: Conditioning) -> Iterator[list[int]]:
    """Yield groups of prompts with equal conditioning, ascending; only near embeddings are compared in full."""
    unit = functional.normalize(conditioning.similarity.float(), dim=1)
    floating = [tensor.dtype for tensor in conditioning.tensors.values() if tensor.is_floating_point()]
    least = 1 - max(1e-6, _tolerance(floating[0] if floating else torch.float32) ** 2)  # cosines of rounding alone
    grouped: set[int] = set()
    for start in range(0, len(unit), _ROWS):
        near = unit[start : start + _ROWS] @ unit.T > least  # (rows, K)
        for row, others in enumerate(near, start):
            if row in grouped or others.sum() < 2:
                continue
            after = [other for other in torch.nonzero(others).flatten().tolist() if other > row]
            group = [row, *(other for other in after if other not in grouped and _same(conditioning, row, other))]
            if len(group) > 1:
                grouped.update(group)
                yield group


def _same(conditioning: Conditioning, first: int, second: int) -> bool:
    return all(_close(tensor[first], tensor[second]) for tensor in conditioning.tensors.values())


def _close(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors differ by rounding at most."""
    if not first.is_floating_point():
        return torch.equal(first, second)
    tolerance = _tolerance(first.dtype)
    first, second = first.float(), second.float()
    return torch.allclose(first, second, rtol=tolerance, atol=_NOISE * float(first.abs().max()))


def _tolerance(dtype: torch.dtype) -> float:
    """Return a relative tolerance: two steps of a 16-bit type; for float32, what the order of operations may change."""
    return max(_NOISE, 2 * torch.finfo(dtype).eps)
