"""The base class of all backbones: what diffusers folders have in common.

The VAE encodes each image once, to the mean of its posterior, so that encoding is deterministic. The text encoders
encode each prompt once. The denoiser runs on the noised latents once per prompt, and forward hooks read its layers
(DIFT: Tang et al., NeurIPS 2023, https://arxiv.org/abs/2306.03881). It does not matter whether the denoiser predicts
noise or velocity, because only its inner maps are read. Nothing past the last requested layer is computed.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn
from torch.nn import functional

from pipeline import devices
from pipeline.diffusion import channels_last
from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Conditioning:
    """K encoded prompts."""

    tensors: dict[str, Tensor]  # the denoiser's inputs, by its own names, each (K, ...) on the device
    similarity: Tensor  # float32 (K, E) on the CPU, one embedding per prompt, to measure which prompts are near

    def select(self, index: Tensor) -> Self:
        """Return the prompts at `index` (B,), in this order; repeats are allowed."""
        selected = {name: tensor[devices.send(index, tensor.device)] for name, tensor in self.tensors.items()}
        return type(self)(selected, self.similarity[index.to(self.similarity.device)])

    def to(self, device: str) -> Self:
        """Return the same prompts for a denoiser on another device."""
        return type(self)({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.similarity)


class Backbone:
    """A diffusers pipeline directory: a denoiser, an AutoencoderKL and a noise schedule, frozen."""

    component: ClassVar[str]
    """The denoiser's folder."""
    model_class: ClassVar[Any]
    vae_class: ClassVar[Any] = AutoencoderKL
    channels: dict[str, int]
    """Layer name -> number of channels C_l, in the order asked for."""

    def __init__(self, path: Path, layers: list[str] | str, device: str, dtype: torch.dtype) -> None:
        """Load denoiser and VAE, the denoiser in `dtype`; raise PipelineError if a part or layer is missing."""
        self.path, self.layers, self.device, self.dtype = path, layers, device, dtype
        self.channels = self.layer_channels(path, layers)
        self._vae_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # XL's VAE overflows float16
        self._model = load_part(self.model_class, path / self.component, device)
        self._vae = load_part(self.vae_class, path / "vae", device)
        self._vae.decoder = nn.Identity()  # never used: its memory is better spent on batches
        self._maps = threading.local()  # batches may be computed side by side
        for layer in self.channels:
            self._model.get_submodule(layer).register_forward_hook(self._keep(layer))
        self._drop_tail()
        self._model.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        self._vae.to(device, self._vae_dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        if device.startswith("cuda"):
            channels_last.adapt(self._model)
            channels_last.adapt(self._vae)

    @classmethod
    def layer_channels(cls, path: Path, layers: list[str] | str) -> dict[str, int]:
        """Return each layer's number of channels, from the configuration alone; see `backbones.load`."""
        try:
            config: dict[str, Any] = cls.model_class.load_config(path / cls.component)
            known, chosen = cls._known_layers(config)
        except (OSError, ValueError, KeyError) as error:
            raise PipelineError(
                f"{path / cls.component}/config.json cannot be read ({error}). Run `pipeline prepare-backbone`."
            ) from None
        wanted = chosen if layers == "auto" else known if layers == "all" else layers
        for layer in wanted:
            if layer not in known:
                raise PipelineError(
                    f"extract_features.layers names {layer}, but {path.name} has {next(iter(known))} "
                    f"to {next(reversed(known))}. Use these layers."
                )
        return {layer: known[layer] for layer in wanted}

    @classmethod
    def patch_size(cls, config: dict[str, Any]) -> int:
        """Return the side of the patches of latents that become tokens, from the denoiser's configuration."""
        return config.get("patch_size", 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the latent of an image."""
        side = image_size >> vae_halvings(self._vae.config)
        return self._vae.config.latent_channels, side, side

    @torch.inference_mode()
    def encode_images(self, images: np.ndarray, image_size: int) -> Tensor:
        """Return VAE latents: the posterior's mean, shifted and scaled as the denoiser expects them.

        Args:
            images: uint8 (B, H, W, 3).
            image_size: Images are resized to this square, bicubically, before encoding.

        Returns:
            float32 (B, C, h, w) on the device.
        """
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
        if pixels.shape[-2:] != (image_size, image_size):
            pixels = functional.interpolate(pixels, (image_size, image_size), mode="bicubic", antialias=True)
            pixels = pixels.clamp(-1, 1)
        pixels = pixels.to(self._vae_dtype, memory_format=torch.channels_last)
        mean = self._encode(pixels).float()
        return (mean - (self._vae.config.get("shift_factor") or 0)) * self._vae.config.scaling_factor

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Return sqrt(alpha_bar_t) * latents + sqrt(1 - alpha_bar_t) * noise (Ho et al., NeurIPS 2020, eq. 4)."""
        alpha_bar = self._alphas_cumprod[timestep].item()
        return alpha_bar**0.5 * latents + (1 - alpha_bar) ** 0.5 * noise

    @torch.inference_mode()
    def features(self, noisy: Tensor, timestep: int, conditioning: Conditioning) -> dict[str, Tensor]:
        """Run one pass of the denoiser.

        Args:
            noisy: float32 (B, C, h, w), noised latents.
            timestep: From 0, below the length of the noise schedule.
            conditioning: B prompts.

        Returns:
            Layer name -> float32 (B, C_l, h_l, w_l).
        """
        self._maps.of_layer = {}
        self._denoise(noisy.to(self.dtype, memory_format=torch.channels_last), timestep, conditioning.tensors)
        of_layer, self._maps.of_layer = self._maps.of_layer, {}  # so that the 16-bit maps are freed
        return {layer: of_layer.pop(layer).float() for layer in self.channels}

    def with_image(self, conditioning: Conditioning, embeddings: Tensor) -> Conditioning:
        """Add an image embedding (B, E) to every token of B prompts; raise PipelineError if the widths differ."""
        states = conditioning.tensors.get("encoder_hidden_states")
        if states is None or states.shape[-1] != embeddings.shape[-1]:
            width = "no prompt embeddings" if states is None else f"prompt embeddings of {states.shape[-1]} numbers"
            raise PipelineError(
                f"extract_features.image_conditioning embeds images in {embeddings.shape[-1]} numbers, "
                f"but {self.path.name} has {width}. Use an image encoder of this width, or no image conditioning."
            )
        states = states + embeddings[:, None].to(states)  # (B, T, E)
        return Conditioning(conditioning.tensors | {"encoder_hidden_states": states}, conditioning.similarity)

    def compile(self) -> None:
        """Compile the denoiser in place; the first pass of each batch size then takes minutes, later ones less."""
        self._model.compile()

    def in_float32(self) -> Self:
        """Load the same model in float32, from its files, because weights rounded to 16 bits would differ."""
        return type(self)(self.path, self.layers, self.device, torch.float32)

    def encode_prompts(self, prompts: list[str], sizes: list[int] | None = None) -> Conditioning:
        """Encode texts; the text encoders are loaded for the call and freed after it.

        `sizes` says how many consecutive texts are averaged into each prompt; None makes every text a prompt.
        """
        raise NotImplementedError

    @classmethod
    def _known_layers(cls, config: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
        """Return all layers with their channels, in order, and the names of those that "auto" selects."""
        raise NotImplementedError

    def _image_side(self, noisy: Tensor) -> int:
        """Return the side, in pixels, of the images of these latents (B, C, h, w)."""
        return noisy.shape[-1] << vae_halvings(self._vae.config)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Return the mean of the VAE's posterior of pixels (B, 3, H, W) in [-1, 1]."""
        return self._vae.encode(pixels).latent_dist.mean

    def _denoise(self, noisy: Tensor, timestep: int, conditioning: dict[str, Tensor]) -> None:
        """Call the denoiser."""
        raise NotImplementedError

    def _drop_tail(self) -> None:
        """Remove the layers after the last requested one."""
        raise NotImplementedError

    def _image_map(self, output: Any) -> Tensor:
        """Convert a layer's output to its map, (B, C_l, h_l, w_l)."""
        return output

    @property
    def _alphas_cumprod(self) -> Tensor:
        """Return float32 (T,) of the model's own schedule: any DDPM-type scheduler's configuration has these keys."""
        if not hasattr(self, "_schedule"):
            self._schedule = DDIMScheduler.from_config(DDIMScheduler.load_config(self.path / "scheduler"))
        return self._schedule.alphas_cumprod

    def _keep(self, layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._maps.of_layer[layer] = self._image_map(output)

        return hook


class TokenBackbone(Backbone):
    """A transformer over patches: its tokens become maps of half the latents' side (for patches of two)."""

    component = "transformer"

    @classmethod
    def _known_layers(cls, config: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
        """Return the blocks; "auto" is the last of the first third, half and two thirds: the paper names none."""
        blocks, channels = cls._blocks(config), config["num_attention_heads"] * config["attention_head_dim"]
        ends = sorted({max(0, round(len(blocks) * share) - 1) for share in (1 / 3, 1 / 2, 2 / 3)})
        return dict.fromkeys(blocks, channels), [blocks[end] for end in ends]

    @classmethod
    def _blocks(cls, config: dict[str, Any]) -> list[str]:
        """Return the names of all blocks in order."""
        return [f"transformer_blocks.{block}" for block in range(config["num_layers"])]

    def features(self, noisy: Tensor, timestep: int, conditioning: Conditioning) -> dict[str, Tensor]:
        """Run one pass of the denoiser; patches must fill the latents, else PipelineError. See `Backbone.features`."""
        patch = self.patch_size(self._model.config)
        height, width = noisy.shape[-2:]
        if height % patch or width % patch:
            raise PipelineError(
                f"extract_features.image_size gives latents of {height}x{width}, which patches of {patch} do not fill. "
                "Set another image_size."
            )
        self._maps.grid = (height // patch, width // patch)
        return super().features(noisy, timestep, conditioning)

    def _image_map(self, output: Tensor) -> Tensor:
        return output.transpose(1, 2).unflatten(2, self._maps.grid)  # (B, N, C) -> (B, C, h/2, w/2)

    def _drop_tail(self) -> None:
        """Cut off later blocks: a transformer's forward does not depend on how many there are."""
        last = max(int(layer.split(".")[1]) for layer in self.channels)
        self._model.transformer_blocks = self._model.transformer_blocks[: last + 1]


class FlowTokenBackbone(TokenBackbone):
    """A transformer trained by flow matching (Lipman et al., ICLR 2023), whose noising is linear."""

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Return (1 - sigma) * latents + sigma * noise, sigma = timestep / the length of the schedule."""
        schedule = DDIMScheduler.load_config(self.path / "scheduler")
        sigma = timestep / schedule.get("num_train_timesteps", 1000)
        return (1 - sigma) * latents + sigma * noise


def vae_halvings(config: Mapping[str, Any]) -> int:
    """Return how many times a VAE of this configuration halves the side of an image."""
    return len(config.get("block_out_channels") or config.get("encoder_block_out_channels") or [0]) - 1


def load_part(model_class: Any, path: Path, device: str) -> Any:
    """Load a part of a pipeline in float32, on "meta" without weights; raise PipelineError if it cannot be loaded."""
    try:
        if device == "meta":
            with torch.device("meta"):
                return model_class.from_config(model_class.load_config(path))
        model, loaded = model_class.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problem = f"{path} cannot be loaded as a {model_class.__name__} ({reason})"
        raise PipelineError(f"{problem}. Get the complete model.") from None
    if missing := sorted(loaded["missing_keys"]):  # the libraries fill these with random numbers
        raise PipelineError(
            f"The weights in {path} lack {len(missing)} of the tensors of a {model_class.__name__} (the first is "
            f"{missing[0]}). Get the complete model."
        )
    return model
