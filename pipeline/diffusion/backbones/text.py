"""Frozen text encoders: prompts -> token states and one more tensor each, averaged in groups while they are encoded.

Encoders are loaded for a call and freed after it, because memory is better spent on large batches. Prompts are padded
to a fixed length and the padding is kept, as diffusers' pipelines do. Longer ones are cut, with a warning.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Model,
    GemmaTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from pipeline.diffusion.backbones.base import load_part
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

_PROMPTS_PER_BATCH = 32
_SHOWN = 60  # characters of a prompt in a warning


class TextEncoder(Protocol):
    """A frozen text encoder with its tokenizer."""

    tokens: "Tokens"

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode B texts as token states, float32 (B, T, E), and a second tensor (B, ...), on the device."""


class ClipEncoder:
    """CLIP; its second tensor is the pooled embedding, float32 (B, E')."""

    def __init__(self, path: Path, number: str, device: str, projected: bool) -> None:
        """Load text encoder `number` ("" or "_2") of a diffusers folder.

        With `projected`, as Stable Diffusion XL and 3 use CLIP, return the states of the second-to-last layer and the
        embedding after the projection, if there is one; otherwise the last layer's.
        """
        part = path / f"text_encoder{number}"
        tokenizer = _tokenizer(CLIPTokenizer, path / f"tokenizer{number}")
        self.tokens = Tokens(tokenizer, tokenizer.model_max_length, part.name)
        encoder_class = CLIPTextModelWithProjection if projected and _projects(part) else CLIPTextModel
        self._encoder, self._device = placed(load_part(encoder_class, part, device), device, torch.float32)
        self._projected, self._output_device = projected, device

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """See `TextEncoder`."""
        ids = self.tokens(prompts).input_ids.to(self._device)
        out = self._encoder(ids, output_hidden_states=self._projected)
        states = out.hidden_states[-2] if self._projected else out.last_hidden_state
        pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
        return states.to(self._output_device), pooled.to(self._output_device)


class T5Encoder:
    """T5; its second tensor is the mask of tokens, int64 (B, T): 1 for a token, 0 for padding."""

    def __init__(self, path: Path, number: str, length: int, device: str, dtype: torch.dtype, masked: bool) -> None:
        """Load text encoder `number` ("", "_2" or "_3") of a diffusers folder; prompts are padded or cut to `length`.

        With `masked`, attention ignores the padding (PixArt: yes, Stable Diffusion 3 and FLUX.1: no).
        """
        part = path / f"text_encoder{number}"
        self.tokens = Tokens(_tokenizer(T5Tokenizer, path / f"tokenizer{number}"), length, part.name)
        computing = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # float16 overflows T5
        self._encoder, self._device = placed(load_part(T5EncoderModel, part, device), device, computing)
        self._masked, self._output_device = masked, device

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """See `TextEncoder`."""
        tokens = self.tokens(prompts)
        mask = tokens.attention_mask.to(self._device)
        out = self._encoder(tokens.input_ids.to(self._device), attention_mask=mask if self._masked else None)
        return out.last_hidden_state.float().to(self._output_device), mask.to(self._output_device)


class GemmaEncoder:
    """Gemma, as Sana uses it; its second tensor is the mask of tokens, int64 (B, T)."""

    def __init__(self, path: Path, length: int, device: str, dtype: torch.dtype) -> None:
        """Load the text encoder of a diffusers folder; prompts are padded on the right, or cut, to `length` tokens."""
        part = path / "text_encoder"
        tokenizer = _tokenizer(GemmaTokenizer, path / "tokenizer")
        tokenizer.padding_side = "right"
        self.tokens = Tokens(tokenizer, length, part.name)
        computing = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # float16 overflows Gemma
        self._encoder, self._device = placed(load_part(Gemma2Model, part, device), device, computing)
        self._output_device = device

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """See `TextEncoder`."""
        tokens = self.tokens(prompts)
        mask = tokens.attention_mask.to(self._device)
        out = self._encoder(tokens.input_ids.to(self._device), attention_mask=mask)
        return out.last_hidden_state.float().to(self._output_device), mask.to(self._output_device)


class Tokens:
    """A tokenizer of one fixed length that remembers what it cut."""

    def __init__(self, tokenizer: Any, length: int, encoder: str) -> None:
        """Pad or cut prompts to `length` tokens; warnings name the text encoder `encoder`."""
        self._tokenizer, self._length, self._encoder = tokenizer, length, encoder
        self._cut: list[tuple[str, list[int]]] = []
        self._seen = 0

    def __call__(self, prompts: list[str]) -> Any:
        """Return token ids and attention mask, int64 (B, T)."""
        tokens = self._tokenizer(
            prompts, padding="max_length", max_length=self._length, truncation=True, return_tensors="pt"
        )
        self._seen += len(prompts)
        for prompt, used in zip(prompts, tokens.attention_mask.sum(1).tolist(), strict=True):
            if used == self._length:  # full: either it just fits, or it was cut
                every = self._tokenizer(prompt, truncation=False, verbose=False).input_ids
                if len(every) > self._length:
                    ends = every[-1] == self._tokenizer.eos_token_id  # as every text of CLIP and T5, but not of Gemma
                    self._cut.append((prompt, every[self._length - 1 : -1] if ends else every[self._length :]))
        return tokens

    def warn_if_truncated(self) -> None:
        """Log how many prompts were cut, and the part that the first one lost."""
        if not self._cut:
            return
        prompt, lost = self._cut[0]
        words = self._tokenizer.decode(lost).strip()
        warn_once(
            f"{len(self._cut)} of {self._seen} prompts are longer than the {self._length} tokens that {self._encoder} "
            f"reads, and their end is ignored. The first, {_short(prompt)!r}, loses {len(lost)} tokens: "
            f"{_short(words)!r}. Shorten it."
        )


def placed(encoder: Any, device: str, dtype: torch.dtype) -> tuple[Any, str]:
    """Move an encoder to the device, or to the CPU if it does not fit beside the denoiser; return it and its device.

    T5-XXL alone takes 10 GB in bfloat16 and 19 GB in float32.
    """
    try:
        return encoder.to(device, dtype).eval(), device
    except torch.OutOfMemoryError:
        encoder = encoder.to("cpu")  # frees what was moved already
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    log.warning(
        "%s does not fit on %s beside the denoiser. Encoding prompts on the CPU.", type(encoder).__name__, device
    )
    return encoder.to("cpu", dtype).eval(), "cpu"


@torch.inference_mode()
def encode(
    encoder: TextEncoder,
    prompts: list[str],
    sizes: list[int] | None,
    tensors: Callable[[Tensor, Tensor], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Encode prompts and average consecutive groups of them as soon as each is complete.

    Averaging at once bounds the memory by the result, one batch and one group, however many templates a prompt has.

    Args:
        encoder: The text encoder.
        prompts: All texts, the groups one after the other.
        sizes: Texts per group; None makes every text a group.
        tensors: Selects from the encoder's two tensors of B texts those to keep, by name, each (B, ...).

    Returns:
        By the same names (K, ...), one row per group: means of floating-point tensors, taken in float32, and unions of
        masks.
    """
    pending: dict[str, Tensor] = {}
    done: dict[str, list[Tensor]] = {}
    left = list(sizes or [1] * len(prompts))[::-1]
    for start in range(0, len(prompts), _PROMPTS_PER_BATCH):
        rows = tensors(*encoder(prompts[start : start + _PROMPTS_PER_BATCH]))
        pending = {name: torch.cat([pending[name], new]) if pending else new for name, new in rows.items()}
        count = len(next(iter(pending.values())))
        complete = 0
        while left and complete + left[-1] <= count:
            group = slice(complete, complete := complete + left.pop())
            for name, values in pending.items():
                done.setdefault(name, []).append(_average(values[group]))
        pending = {name: values[complete:] for name, values in pending.items()} if complete < count else {}
    encoder.tokens.warn_if_truncated()
    return {name: torch.stack(groups) for name, groups in done.items()}


def clip_tensors(dtype: torch.dtype) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """Return `tensors` of `encode` for CLIP: states and pooled are rounded to `dtype` before they are averaged."""
    return lambda states, pooled: {"states": states.to(dtype), "pooled": pooled.to(dtype), "similarity": pooled.float()}


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (B, E) of token states (B, T, E) over the tokens that the mask (B, T) keeps."""
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _average(group: Tensor) -> Tensor:
    """Average embeddings (B, ...) to (...), or unite masks of tokens."""
    if not group.is_floating_point():
        return group.amax(0)
    return group[0].clone() if len(group) == 1 else group.float().mean(0).to(group.dtype)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning once per process: prompts are encoded again if a pair is recomputed in float32."""
    log.warning("%s", message)


def _short(text: str) -> str:
    """Shorten a long text to its beginning and its end, where class names usually are."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


def _projects(part: Path) -> bool:
    from transformers import AutoConfig

    return "CLIPTextModelWithProjection" in (AutoConfig.from_pretrained(part).architectures or ())


def _tokenizer(tokenizer_class, path: Path):
    try:
        return tokenizer_class.from_pretrained(path)
    except (OSError, ValueError, TypeError, ImportError) as error:
        problem = f"{path} cannot be loaded as a {tokenizer_class.__name__} ({error})"
        raise PipelineError(f"{problem}. Get the complete model.") from None
