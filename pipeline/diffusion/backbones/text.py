"""Frozen text encoders: prompts -> token states and one pooled embedding.

Encoders are loaded for a call and freed after it: text is encoded once per class, and memory is better spent on large
batches. Prompts are padded to a fixed length and the padding is kept, as diffusers' pipelines do.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from pipeline.diffusion.backbones.base import load_part
from pipeline.errors import PipelineError

_PROMPTS_PER_BATCH = 32


@torch.inference_mode()
def clip_states(path: Path, number: str, prompts: list[str], device: str, projected: bool) -> tuple[Tensor, Tensor]:
    """CLIP's token states and pooled embedding.

    Args:
        path: a diffusers pipeline directory.
        number: "" or "_2": which of its text encoders.
        prompts: K texts.
        device: torch device.
        projected: as Stable Diffusion XL and 3 use CLIP: the states of the last layer but one, and the pooled
            embedding projected where the encoder has a projection. Else the last layer's.

    Returns:
        float32 (K, T, E) and float32 (K, E'), on the device.
    """
    part = path / f"text_encoder{number}"
    tokenizer = _tokenizer(CLIPTokenizer, path / f"tokenizer{number}")
    encoder_class = CLIPTextModelWithProjection if projected and _projects(part) else CLIPTextModel
    encoder = load_part(encoder_class, part, device).to(device, torch.float32).eval()
    states, pooled = [], []
    for start in range(0, len(prompts), _PROMPTS_PER_BATCH):
        tokens = tokenizer(
            prompts[start : start + _PROMPTS_PER_BATCH],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        out = encoder(tokens.input_ids.to(device), output_hidden_states=projected)
        states.append(out.hidden_states[-2] if projected else out.last_hidden_state)
        pooled.append(out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output)
    return torch.cat(states), torch.cat(pooled)


@torch.inference_mode()
def t5_states(
    path: Path, number: str, prompts: list[str], length: int, device: str, dtype: torch.dtype, masked: bool
) -> tuple[Tensor, Tensor]:
    """T5's token states.

    Args:
        path: a diffusers pipeline directory.
        number: "" or "_3": which of its text encoders.
        prompts: K texts.
        length: T, to which prompts are padded or cut.
        device: torch device.
        dtype: the encoder computes in this type; float16 overflows it, so float32 is taken instead.
        masked: whether attention leaves out the padding (PixArt: yes, Stable Diffusion 3: no).

    Returns:
        float32 (K, T, E), and the mask, int64 (K, T): 1 for a token, 0 for padding.
    """
    tokenizer = _tokenizer(T5Tokenizer, path / f"tokenizer{number}")
    encoder = load_part(T5EncoderModel, path / f"text_encoder{number}", device)
    encoder = encoder.to(device, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).eval()
    states, masks = [], []
    for start in range(0, len(prompts), _PROMPTS_PER_BATCH):
        tokens = tokenizer(
            prompts[start : start + _PROMPTS_PER_BATCH],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(device)
        out = encoder(tokens.input_ids.to(device), attention_mask=mask if masked else None)
        states.append(out.last_hidden_state.float())
        masks.append(mask)
    return torch.cat(states), torch.cat(masks)


def _projects(part: Path) -> bool:
    from transformers import AutoConfig

    return "CLIPTextModelWithProjection" in (AutoConfig.from_pretrained(part).architectures or ())


def _tokenizer(tokenizer_class, path: Path):
    try:
        return tokenizer_class.from_pretrained(path)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise PipelineError(f"{path} cannot be loaded as a {tokenizer_class.__name__} ({error})") from None
