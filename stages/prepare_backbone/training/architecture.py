"""The untrained models in three sizes, of Stable Diffusion's architecture (Rombach et al., CVPR 2022), and a tokenizer.

An AutoencoderKL maps images to latents of a quarter of their side and 4 channels. The UNet2DConditionModel has four up
blocks and cross-attention to a CLIP text encoder.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import diffusers
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipeline.errors import ConfigError
from pipeline.text import printable

for _library in (diffusers.utils.logging, transformers.utils.logging):  # their notes and bars tell users nothing
    _library.set_verbosity_error()
    _library.disable_progress_bar()

TEXT_LENGTH = 32
"""Tokens of a text, with those that mark its start and end."""

_SIDE_RATIO = 4  # pixels of an image to positions of its latent, along one side
_PROMPTS = ("a photo of a similar object", "a photo of a visual object")  # defaults that no caption contains


@dataclass(frozen=True)
class Size:
    """Widths of the models, and the largest learning rates that suit them."""

    vae: tuple[int, int, int]
    unet: tuple[int, int, int, int]
    text: int
    heads: int  # of the UNet's attention
    autoencoder_learning_rate: float
    denoiser_learning_rate: float


SIZES: dict[Literal["nano", "small", "base"], Size] = {
    "nano": Size((16, 32, 32), (32, 48, 64, 64), 64, 4, 2e-3, 1.5e-3),
    "small": Size((32, 48, 64), (64, 96, 128, 112), 96, 4, 1.5e-3, 1e-3),
    "base": Size((48, 96, 128), (160, 224, 256, 256), 256, 8, 1e-3, 5e-4),
}


def build(size: Size, image_size: int, captions: Iterable[str]) -> StableDiffusionPipeline:
    """Return the untrained pipeline, float32, with weights drawn from torch's global generator.

    Args:
        size: An entry of `SIZES`.
        image_size: Height and width of the images, pixels; a multiple of 8.
        captions: The tokenizer has whole words of these texts and of the default prompts; others become letters.

    Raises:
        ConfigError: A caption has more than `TEXT_LENGTH` tokens.
    """
    captions = list(captions)
    tokenizer = build_tokenizer([*captions, *_PROMPTS])
    check_lengths(tokenizer, captions)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=size.text, intermediate_size=2 * size.text, projection_dim=size.text,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=TEXT_LENGTH, **special,
    ))  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=size.vae, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=image_size,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=image_size // _SIDE_RATIO, block_out_channels=size.unet, layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, cross_attention_dim=size.text,
        attention_head_dim=size.heads,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def build_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """Return CLIP's byte-level BPE with merges for the words of these texts, in their order; other words become bytes.

    A word gets one token, unless its letters are merged earlier by the rules of a word before it.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    merges: dict[tuple[str, str], None] = {}
    for word in _words(_tokenizer(tokens, []), texts):
        head, *tail = [*word[:-1], word[-1] + "</w>"]
        for symbol in tail:
            if (head, symbol) not in merges:
                merges[head, symbol] = None
                tokens.append(head + symbol)
            head += symbol
    return _tokenizer(tokens, list(merges))


def check_lengths(tokenizer: CLIPTokenizer, captions: Iterable[str]) -> None:
    """Raise ConfigError, which names the longest, if a caption has more tokens than the text encoder reads."""
    lengths = {caption: len(tokenizer(caption).input_ids) for caption in captions}
    longest = max(lengths, key=lambda caption: lengths[caption])
    if lengths[longest] > TEXT_LENGTH:
        raise ConfigError(
            f"The caption {printable(longest[:80])!r} has {lengths[longest]} tokens, and the model reads "
            f"{TEXT_LENGTH}. Shorten prepare_backbone.training.caption, or the name of the class folder."
        )


def _tokenizer(tokens: list[str], merges: list[tuple[str, str]]) -> CLIPTokenizer:
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def _words(tokenizer: CLIPTokenizer, texts: Iterable[str]) -> list[str]:
    """Return the distinct words of texts, in their order, as the tokenizer splits them, in its symbols for bytes."""
    backend = tokenizer.backend_tokenizer
    split = [backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)) for text in texts]
    return list(dict.fromkeys(word for pieces in split for word, _ in pieces))
