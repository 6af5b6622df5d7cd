"""Stable Diffusion 1.5 and 2.1 at full size with random weights, to measure time and memory without a download.

The sizes are those of the published configurations; the weights' values do not affect the time of a pass.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_SD15 = _UNET | {"cross_attention_dim": 768, "attention_head_dim": 8}
_SD21 = _UNET | {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}
_SD21["use_linear_projection"] = True
_TOKENS = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
_TEXT = _TOKENS | {"max_position_embeddings": 77}
_TEXT15 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_TEXT21 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
_SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SCHEDULE |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SIZES = {"sd15": (_SD15, _TEXT15, "epsilon"), "sd21": (_SD21, _TEXT21, "v_prediction")}


def save(size: str, path: Path) -> Path:
    """Write a diffusers pipeline directory with float16 weights of a size, "sd15" or "sd21", about 2 GB."""
    unet, text, prediction_type = SIZES[size]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        pipe = StableDiffusionPipeline(
            unet=UNet2DConditionModel(**unet),
            vae=AutoencoderKL(**_VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**_TEXT, **text, projection_dim=text["hidden_size"])),
            tokenizer=_byte_tokenizer(),
            scheduler=DDIMScheduler(**_SCHEDULE, prediction_type=prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.to(dtype=torch.float16).save_pretrained(path)
    return path


def _byte_tokenizer() -> CLIPTokenizer:
    """Make CLIP's tokenizer without merges; the size of the vocabulary does not affect the time of a pass."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[], model_max_length=77)
