"""Count the cost of a pass of published models, built at full size without weights.

The configurations are the published ones. A pass ends at the last layer that `layers: auto` reads; the numbers of text
tokens are those of the backbones. Prints the table of docs/models.md, then one JSON line.

    python benchmarks/backbones.py
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import stable_diffusion
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.diffusion import backbones
from pipeline.diffusion.backbones import Conditioning

SIDES = (256, 512, 1024)  # pixels
_SDXL = stable_diffusion._UNET | {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD3 = {"sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24}
_SD3 |= {"joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048}
_SD3 |= {"pos_embed_max_size": 192}
_PIXART = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "cross_attention_dim": 1152}
_PIXART |= {"caption_channels": 4096, "sample_size": 64, "out_channels": 8, "norm_type": "ada_norm_single"}
_DIT = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "out_channels": 8}
_FLUX = {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24}
_FLUX |= {"joint_attention_dim": 4096, "pooled_projection_dim": 768}
_SANA = {"in_channels": 32, "out_channels": 32, "caption_channels": 2304, "sample_size": 32, "mlp_ratio": 2.5}
_SANA600 = {"num_layers": 28, "num_attention_heads": 36, "attention_head_dim": 32, "cross_attention_dim": 1152}
_SANA600 |= {"num_cross_attention_heads": 16, "cross_attention_head_dim": 72}
_SANA1600 = {"num_layers": 20, "num_attention_heads": 70, "attention_head_dim": 32, "cross_attention_dim": 2240}
_SANA1600 |= {"num_cross_attention_heads": 20, "cross_attention_head_dim": 112}
_VAE = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4}
_VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}

# Name: denoiser's class, its configuration, channels of the latents, prompts' tensors (shape of one, dtype).
MODELS: dict[str, tuple[str, dict[str, Any], int, dict[str, tuple[tuple[int, ...], torch.dtype]]]] = {
    "Stable Diffusion 1.5": (
        "UNet2DConditionModel", stable_diffusion._SD15, 4, {"encoder_hidden_states": ((77, 768), torch.float32)},
    ),
    "Stable Diffusion 2.1": (
        "UNet2DConditionModel", stable_diffusion._SD21, 4, {"encoder_hidden_states": ((77, 1024), torch.float32)},
    ),
    "Stable Diffusion XL": (
        "UNet2DConditionModel", _SDXL, 4,
        {"encoder_hidden_states": ((77, 2048), torch.float32), "text_embeds": ((1280,), torch.float32)},
    ),
    "Stable Diffusion 3 medium": (
        "SD3Transformer2DModel", _SD3, 16,
        {"encoder_hidden_states": ((333, 4096), torch.float32), "pooled_projections": ((2048,), torch.float32)},
    ),
    "PixArt-Sigma": (
        "PixArtTransformer2DModel", _PIXART, 4,
        {"encoder_hidden_states": ((120, 4096), torch.float32), "encoder_attention_mask": ((120,), torch.int64)},
    ),
    "DiT-XL/2": ("DiTTransformer2DModel", _DIT, 4, {"class_labels": ((), torch.int64)}),
    "FLUX.1-dev": (
        "FluxTransformer2DModel", _FLUX | {"guidance_embeds": True}, 16,
        {"encoder_hidden_states": ((512, 4096), torch.float32), "pooled_projections": ((768,), torch.float32)},
    ),
    "FLUX.1-schnell": (
        "FluxTransformer2DModel", _FLUX | {"guidance_embeds": False}, 16,
        {"encoder_hidden_states": ((256, 4096), torch.float32), "pooled_projections": ((768,), torch.float32)},
    ),
    "Sana 0.6B": (
        "SanaTransformer2DModel", _SANA | _SANA600, 32,
        {"encoder_hidden_states": ((300, 2304), torch.float32), "encoder_attention_mask": ((300,), torch.int64)},
    ),
    "Sana 1.6B": (
        "SanaTransformer2DModel", _SANA | _SANA1600, 32,
        {"encoder_hidden_states": ((300, 2304), torch.float32), "encoder_attention_mask": ((300,), torch.int64)},
    ),
}  # fmt: skip


@click.command(help=__doc__)
def main() -> None:
    """Count and print."""
    click.echo("| model | denoiser | `auto` layers (channels) | " + " | ".join(f"{side} px" for side in SIDES) + " |")
    click.echo("|---|---|---|" + "---|" * len(SIDES))
    found = {}
    for name, model in MODELS.items():
        row = found[name] = _count(*model)
        layers = ", ".join(f"`{layer}`" for layer in row["layers"])
        channels = ", ".join(map(str, row["layers"].values()))
        costs = " | ".join(f"{row['flops'][side] / 1e9:,.0f}" for side in SIDES)
        click.echo(f"| {name} | {row['parameters'] / 1e9:.2f} B | {layers} ({channels}) | {costs} |")
    click.echo(json.dumps(found))


def _count(kind: str, config: dict[str, Any], channels: int, prompt: dict) -> dict[str, Any]:
    """Return parameters of the whole denoiser, layers with their channels, and FLOPs of a pass by the image's side."""
    component = "unet" if kind.startswith("UNet") else "transformer"
    vae = "AutoencoderDC" if kind.startswith("Sana") else "AutoencoderKL"
    index: dict[str, Any] = {component: ["diffusers", kind], "vae": ["diffusers", vae], "id2label": {"0": "cat"}}
    for number in ("", "_2", "_3"):  # of any class: their configurations are not read without the files
        index[f"text_encoder{number}"] = ["transformers", _encoder(kind, number)]
        index[f"tokenizer{number}"] = ["transformers", "CLIPTokenizer"]
    flow = kind.startswith(("SD3", "Flux", "Sana"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        files = {
            "model_index.json": index,
            f"{component}/config.json": config,
            "vae/config.json": {"latent_channels": channels} if vae == "AutoencoderDC" else _VAE | {
                "latent_channels": channels
            },
            "scheduler/scheduler_config.json": {
                "_class_name": "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
            },
        }  # fmt: skip
        for name, content in files.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(json.dumps(content), encoding="utf-8")
        backbone = backbones.load(path, "auto", "meta", torch.float32)
        with torch.device("meta"):
            parameters = sum(value.numel() for value in backbone.model_class.from_config(config).parameters())
        tensors = {name: torch.empty(1, *shape, dtype=dtype, device="meta") for name, (shape, dtype) in prompt.items()}
        conditioning = Conditioning(tensors, torch.empty(1, 1))
        flops = {}
        for side in SIDES:
            noisy = torch.empty(1, *backbone.latent_shape(side), device="meta")
            with FlopCounterMode(display=False) as counter:
                backbone.features(noisy, 1, conditioning)
            flops[side] = counter.get_total_flops()
    return {"parameters": parameters, "layers": backbone.channels, "flops": flops}


def _encoder(kind: str, number: str) -> str:
    if kind.startswith("Sana"):
        return "Gemma2Model"
    is_t5 = kind.startswith("PixArt") or (kind.startswith("Flux") and number == "_2") or number == "_3"
    return "T5EncoderModel" if is_t5 else "CLIPTextModelWithProjection"


if __name__ == "__main__":
    main()
