"""Frozen diffusion models as feature extractors, one file per family, chosen by a diffusers folder's configuration.

base.py      the base class of all backbones
unet.py      Stable Diffusion 1.x, 2.x and XL, and any other text-conditioned UNet2DConditionModel
pixart.py    PixArt: a transformer with cross-attention to T5
dit.py       DiT: a transformer conditioned on ImageNet's classes
sd3.py       Stable Diffusion 3: a joint text and image transformer, flow matching
flux.py      FLUX.1: the same with packed latents
sana.py      Sana: linear attention, latents of a 32nd of the image's side, flow matching
text.py      CLIP, T5 and Gemma text encoders
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from pipeline.diffusion import families
from pipeline.diffusion.backbones.base import Backbone, Conditioning, vae_halvings
from pipeline.diffusion.backbones.dit import DiTBackbone
from pipeline.diffusion.backbones.flux import FluxBackbone
from pipeline.diffusion.backbones.pixart import PixArtBackbone
from pipeline.diffusion.backbones.sana import SanaBackbone
from pipeline.diffusion.backbones.sd3 import StableDiffusion3Backbone
from pipeline.diffusion.backbones.unet import UNetBackbone
from pipeline.errors import PipelineError
from pipeline.io import system_errors

__all__ = ["Backbone", "Conditioning", "check_image_size", "check_timesteps", "family", "layer_channels", "load"]

for _library in (diffusers.utils.logging, transformers.utils.logging):  # their notes and bars tell users nothing
    _library.set_verbosity_error()
    _library.disable_progress_bar()

_USUAL_TIMESTEPS = 1000  # the default of every diffusers scheduler

_FAMILIES: dict[str, type[Backbone]] = {
    "UNet2DConditionModel": UNetBackbone,
    "PixArtTransformer2DModel": PixArtBackbone,
    "DiTTransformer2DModel": DiTBackbone,
    "SD3Transformer2DModel": StableDiffusion3Backbone,
    "FluxTransformer2DModel": FluxBackbone,
    "SanaTransformer2DModel": SanaBackbone,
}


def load(path: Path, layers: list[str] | str, device: str, dtype: torch.dtype) -> Backbone:
    """Load the model in a diffusers folder with safetensors weights as the family that its denoiser belongs to.

    `layers` are names, "auto" for the family's own choice, or "all"; the denoiser computes in `dtype`. Device "meta"
    builds the models without weights, for counting. Raise PipelineError if the model is unsupported, has no such
    layer, or a part cannot be loaded.
    """
    return family(path)(path, layers, device, dtype)


def layer_channels(path: Path, layers: list[str] | str) -> dict[str, int]:
    """Return the channels of each layer, from the model's configuration alone; raise PipelineError as `load` does."""
    return family(path).layer_channels(path, layers)


def family(path: Path) -> type[Backbone]:
    """Return the backbone class for a diffusers folder; raise PipelineError if its configurations are not supported."""
    index = _json(path / families.INDEX)
    files = [name for name in families.config_files(index) if (path / name).is_file()]
    return _FAMILIES[
        families.identify(path.name, {families.INDEX: index} | {name: _json(path / name) for name in files})
    ]


def check_timesteps(path: Path, timesteps: Iterable[int], key: str) -> None:
    """Check that the model's noise schedule has these timesteps, counted from 0; `key` of params.yaml names them.

    Raise PipelineError, with the largest timestep, if the schedule is shorter.
    """
    count = _json(path / "scheduler" / "scheduler_config.json").get("num_train_timesteps", _USUAL_TIMESTEPS)
    if beyond := [timestep for timestep in timesteps if timestep >= count]:
        raise PipelineError(
            f"{key} = {beyond[0]}: the noise schedule of {path.name} has {count} timesteps. "
            f"Set it to at most {count - 1}."
        )


def check_image_size(path: Path, image_size: int) -> None:
    """Check that images of this size, in pixels, become latents that the model takes.

    Raise PipelineError if they are too small for the VAE, or the latents do not fill a transformer's patches.
    """
    halvings = vae_halvings(_json(path / "vae" / "config.json"))
    side, denoiser = image_size >> halvings, family(path)
    patch = denoiser.patch_size(_json(path / denoiser.component / "config.json"))
    if side == 0 or side % patch:
        raise PipelineError(
            f"extract_features.image_size = {image_size} does not fit {path.name}. Set a multiple of "
            f"{patch << halvings}."
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise system_errors.refusal(error, file) or PipelineError(
            f"{file} cannot be read ({error}). Run `pipeline prepare-backbone`."
        ) from None
