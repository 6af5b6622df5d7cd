"""The supported families of diffusion models, recognised by their configuration files.

A few kilobytes of a diffusers pipeline, model_index.json and the config.json of each part, say what its denoiser is and
which inputs it needs. Models that cannot be used are rejected here, before gigabytes are downloaded or loaded. Values
that an old configuration leaves out are not checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import PipelineError

INDEX = "model_index.json"
SUPPORTED = "Use Stable Diffusion 1, 2, XL or 3, FLUX.1, Sana, PixArt or DiT; docs/models.md lists models."

_CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
_T5 = ("T5EncoderModel",)
_GEMMA = ("Gemma2Model",)
_TOKENIZERS = (
    "CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast",
)  # fmt: skip
_FLOW = ("SD3Transformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel")
"""Denoisers trained by flow matching."""
_NORMS = {"ada_norm_single": "PixArtTransformer2DModel", "ada_norm_zero": "DiTTransformer2DModel"}
_CHANNELS = {5: "depth to image", 7: "upscaling", 8: "image editing or depth", 9: "inpainting"}
"""The purpose of a UNet's additional input channels, in published models."""

Configs = Mapping[str, Mapping[str, Any]]
"""File name, such as "unet/config.json", -> its JSON; missing files are left out."""


@dataclass(frozen=True)
class _Family:
    denoiser: str
    encoders: Mapping[str, tuple[str, ...]]
    """Text encoder -> the classes that are supported."""
    optional: tuple[str, ...] = ()
    vae: str = "AutoencoderKL"
    packed: int = 1
    """How many of a latent's positions become the channels of one token before the denoiser."""


_FAMILIES = {
    "UNet2DConditionModel": _Family("unet", {"text_encoder": _CLIP}),
    "PixArtTransformer2DModel": _Family("transformer", {"text_encoder": _T5}),
    "DiTTransformer2DModel": _Family("transformer", {}),
    "SD3Transformer2DModel": _Family(
        "transformer", {"text_encoder": _CLIP, "text_encoder_2": _CLIP, "text_encoder_3": _T5}, ("text_encoder_3",)
    ),
    "FluxTransformer2DModel": _Family("transformer", {"text_encoder": _CLIP, "text_encoder_2": _T5}, packed=4),
    "SanaTransformer2DModel": _Family("transformer", {"text_encoder": _GEMMA}, vae="AutoencoderDC"),
}
_XL = _Family("unet", {"text_encoder": _CLIP, "text_encoder_2": _CLIP})


def parts(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the parts that model_index.json names, with their classes; parts set to null are left out."""
    pairs = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: str(entry[1]) for name, entry in pairs.items() if entry[1] is not None}


def config_files(index: Mapping[str, Any]) -> list[str]:
    """Return the configurations that `identify` reads if they exist, as paths inside the pipeline's folder."""
    models = [part for part in parts(index) if part.startswith(("unet", "transformer", "vae", "text_encoder"))]
    return [*(f"{part}/config.json" for part in models), "scheduler/scheduler_config.json"]


def identify(title: str, configs: Configs) -> str:
    """Return the class of a pipeline's denoiser; PixArt's and DiT's by their current names.

    `configs` has model_index.json and those of `config_files` that exist; errors name the model by `title`.

    Raises:
        PipelineError: The model is not supported. The message says why, and which models are.
    """
    found = parts(configs[INDEX])
    name = _denoiser_class(title, found, configs)
    family, config = _FAMILIES[name], configs.get(f"{_FAMILIES[name].denoiser}/config.json")
    if config is None:
        raise PipelineError(f"{title} lacks {family.denoiser}/config.json. Get the complete model.")
    if name == "UNet2DConditionModel":
        _check_unet(title, found, config)
        family = _XL if config.get("addition_embed_type") == "text_time" else family
    class_names = configs[INDEX].get("id2label")
    if name == "DiTTransformer2DModel" and not (isinstance(class_names, dict) and class_names):
        raise PipelineError(
            f"{title} is a DiT without class names for its prompts (id2label in {INDEX}). Copy id2label from the "
            f"{INDEX} of the published model, as docs/models.md shows."
        )
    if name == "SanaTransformer2DModel" and config.get("guidance_embeds"):
        raise PipelineError(
            f"{title} is a Sana that was distilled for few steps (guidance_embeds). Use the model that it is derived "
            "from, such as Efficient-Large-Model/Sana_600M_512px_diffusers."
        )
    _check_vae(title, found, family, config, configs.get("vae/config.json", {}))
    _check_text(title, found, family)
    _check_widths(title, name, config, configs)
    _check_schedule(title, found, name, configs.get("scheduler/scheduler_config.json"))
    return name


def _denoiser_class(title: str, found: Mapping[str, str], configs: Configs) -> str:
    name = found.get("unet") or found.get("transformer")
    if name is None:
        pipeline = configs[INDEX].get("_class_name", "pipeline")
        listed = ", ".join(found) or "no parts"
        raise PipelineError(
            f"{title} has neither a unet nor a transformer in its {INDEX} (it is a {pipeline} with {listed}). "
            f"{SUPPORTED}"
        )
    if name == "Transformer2DModel":  # how PixArt and DiT were saved before diffusers split the class
        norm = configs.get("transformer/config.json", {}).get("norm_type")
        name = _NORMS.get(str(norm), f"Transformer2DModel with norm_type {norm}")
    if name not in _FAMILIES:
        pipeline = configs[INDEX].get("_class_name")
        kind = f" of a {pipeline}" if pipeline else ""
        raise PipelineError(f"{title} has an unsupported denoiser ({name}{kind}). {SUPPORTED}")
    return name


def _check_unet(title: str, found: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Reject a UNet that needs inputs besides the latents, the timestep and the text."""
    keys = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
    wants = [f"{key} {config[key]}" for key in keys if config.get(key) is not None]
    kind = config.get("addition_embed_type")
    if kind not in (None, "text_time"):
        wants.append(f"addition_embed_type {kind}")
    if wants:
        raise PipelineError(
            f"{title} has a UNet that needs inputs other than an image and a text ({', '.join(wants)}). Use the "
            "text-to-image model that it is derived from."
        )
    if kind == "text_time" and "text_encoder" not in found and "text_encoder_2" in found:
        raise PipelineError(
            f"{title} is a refiner (its UNet needs an aesthetic score and only the second text encoder). Use the base "
            "model, such as stabilityai/stable-diffusion-xl-base-1.0."
        )


def _check_vae(
    title: str, found: Mapping[str, str], family: _Family, config: Mapping[str, Any], vae: Mapping[str, Any]
) -> None:
    if found.get("vae") != family.vae:
        has = f"a VAE of class {found['vae']}" if "vae" in found else "no VAE"
        raise PipelineError(f"{title} has {has}, but needs an {family.vae}. {SUPPORTED}")
    given, wanted = vae.get("latent_channels"), config.get("in_channels")
    given = given * family.packed if isinstance(given, int) else given
    if isinstance(given, int) and isinstance(wanted, int) and given != wanted:
        purpose = f", as a model for {_CHANNELS[wanted]}" if wanted in _CHANNELS else ""
        raise PipelineError(
            f"{title} has a denoiser that takes {wanted} channels{purpose}, but the VAE gives {given}. Use the "
            "text-to-image model that it is derived from."
        )


def _check_text(title: str, found: Mapping[str, str], family: _Family) -> None:
    for part, classes in family.encoders.items():
        if part not in found and part in family.optional:
            continue
        if found.get(part) not in classes:
            has = f"a {part} of class {found[part]}" if part in found else f"no {part}"
            raise PipelineError(f"{title} has {has}, but needs a {' or '.join(classes)}. {SUPPORTED}")
        tokenizer = part.replace("text_encoder", "tokenizer")
        if found.get(tokenizer) not in _TOKENIZERS:
            has = f"a {tokenizer} of class {found[tokenizer]}" if tokenizer in found else f"no {tokenizer}"
            raise PipelineError(f"{title} has {has}, but needs one of {', '.join(_TOKENIZERS)}. {SUPPORTED}")


def _check_widths(title: str, name: str, config: Mapping[str, Any], configs: Configs) -> None:
    """Check that the text encoders' embeddings are as wide as the denoiser expects."""

    def width(part: str, key: str) -> int | None:
        return configs.get(f"{part}/config.json", {}).get(key)

    pairs: list[tuple[str, list[int | None]]] = []
    if name == "UNet2DConditionModel":
        xl = config.get("addition_embed_type") == "text_time"
        encoders = ["text_encoder", "text_encoder_2"] if xl else ["text_encoder"]
        pairs.append(("cross_attention_dim", [width(part, "hidden_size") for part in encoders]))
        if xl:
            sizes = config.get("addition_time_embed_dim")
            inputs = [sizes and 6 * sizes, width("text_encoder_2", "projection_dim")]
            pairs.append(("projection_class_embeddings_input_dim", inputs))
    elif name == "PixArtTransformer2DModel":
        pairs.append(("caption_channels", [width("text_encoder", "d_model")]))
    elif name == "SD3Transformer2DModel":
        pooled = [width(part, "projection_dim") for part in ("text_encoder", "text_encoder_2")]
        pairs.append(("pooled_projection_dim", pooled))
    elif name == "FluxTransformer2DModel":
        pairs.append(("pooled_projection_dim", [width("text_encoder", "hidden_size")]))
        pairs.append(("joint_attention_dim", [width("text_encoder_2", "d_model")]))
    elif name == "SanaTransformer2DModel":
        pairs.append(("caption_channels", [width("text_encoder", "hidden_size")]))
    for key, given in pairs:
        wanted = config.get(key)
        known = [number for number in given if isinstance(number, int)]
        if isinstance(wanted, int) and len(known) == len(given) and sum(known) != wanted:
            raise PipelineError(
                f"{title} has a denoiser with {key} {wanted}, but its text encoders give "
                f"{' + '.join(map(str, known))} (it needs inputs other than a text). {SUPPORTED}"
            )


def _check_schedule(title: str, found: Mapping[str, str], name: str, schedule: Mapping[str, Any] | None) -> None:
    if schedule is None:
        raise PipelineError(
            f"{title} lacks scheduler/scheduler_config.json, the noise schedule. Get the complete model."
        )
    kind = str(schedule.get("_class_name") or found.get("scheduler"))
    flow = kind.startswith("FlowMatch") or schedule.get("prediction_type") == "flow_prediction"
    if flow != (name in _FLOW):
        trained = "flow matching" if flow else "diffusion"
        raise PipelineError(f"{title} is a {name} trained by {trained} ({kind}), which is not supported. {SUPPORTED}")
