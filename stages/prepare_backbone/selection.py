"""Select the files of a model, by the names in its repository or directory and its few kilobytes of JSON.

The files get canonical names: a variant, such as diffusion_pytorch_model.fp16.safetensors, becomes
diffusion_pytorch_model.safetensors, so that code that loads a model needs no variants, and its hashes cover exactly the
files that are loaded.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.diffusion import families
from pipeline.errors import DataError
from pipeline.hub.kinds import CONVERT
from pipeline.io import system_errors

_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
_MODELS = ("unet", "transformer", "vae", *_TEXT)
_PARTS = (*_MODELS, "scheduler", *(part.replace("text_encoder", "tokenizer") for part in _TEXT))
_SMALL = (".json", ".txt", ".model")


class Source(Protocol):
    """A model's repository on the hub, or its directory."""

    title: str  # for errors and logs
    sizes: dict[str, int]  # its files, path with "/" between the parts -> bytes
    listed: bool  # whether `sizes` has all of its files; False if only those in the cache are known

    def read(self, name: str) -> Path:
        """Return the path of a small file."""

    def fetch(self, names: Sequence[str]) -> dict[str, tuple[Path, str]]:
        """Return each file's absolute path and SHA-256, 64 hexadecimal digits."""


@dataclass(frozen=True)
class Selection:
    """The files of a model that are loaded."""

    family: str  # the class of the denoiser
    files: dict[str, str]  # canonical name -> name in the source
    variant: str | None  # "fp16" if any of the weights are


def select(source: Source, variant: str, prefer_fp16: bool) -> Selection:
    """Check a model by its configurations and choose its files, without reading weights.

    `variant` "none" selects full weights, "fp16" half-size ones if a part has them, and "auto" either, by `prefer_fp16`
    if a part has both. Raise DataError if features cannot be extracted from the model, or no weights can be loaded.
    """
    index = _index(source)
    configs = {families.INDEX: index}
    configs |= {name: _json(source, name) for name in families.config_files(index) if name in source.sizes}
    family = families.identify(source.title, configs)
    files = {families.INDEX: families.INDEX}
    parts = [part for part in _PARTS if part in families.parts(index)]
    variants = set()
    for part in parts:
        names = [name for name in source.sizes if name.startswith(f"{part}/") and name.count("/") == 1]
        files |= {name: name for name in names if name.endswith(_SMALL) and not _is_weight_index(name)}
        if part in _MODELS:
            chosen = _weights(source, part, names, variant, prefer_fp16)
            files |= chosen
            variants |= {"fp16" for name in chosen.values() if ".fp16" in name}
        elif part.startswith("tokenizer"):
            _check_tokenizer(source.title, part, names)
    weights = [name for name in files.values() if name.endswith(".safetensors")]
    if not source.listed and variants and any(".fp16" not in name for name in weights):
        raise DataError(
            f"{source.title} has full weights of some parts and fp16 weights of others, and the hub's list of files is "
            "not available. Run once with a network connection."
        )
    if variant == "fp16" and not variants:
        raise DataError(f"{source.title} has no fp16 files. Set prepare_backbone.variant to auto or none.")
    return Selection(family, dict(sorted(files.items())), next(iter(variants), None))


def _weights(source: Source, part: str, names: Collection[str], variant: str, prefer_fp16: bool) -> dict[str, str]:
    """Return canonical name -> name of one complete set of weights of a part."""
    stem = "model" if part in _TEXT else "diffusion_pytorch_model"
    full, half = (_weight_set(source, part, stem, infix, names) for infix in ("", ".fp16"))
    if variant == "none" and not full and half:
        raise DataError(f"{source.title} has {part} only as fp16. Set prepare_backbone.variant to auto.")
    order = (half, full) if variant == "fp16" or (variant == "auto" and prefer_fp16) else (full, half)
    chosen = next((files for files in order if files), None)
    if chosen is None:
        raise DataError(f"{source.title} {_why_no_weights(part, names)}")
    return chosen


def _weight_set(source: Source, part: str, stem: str, infix: str, names: Collection[str]) -> dict[str, str]:
    """Return the single file, or the shards and their index; nothing if there are none or some are missing.

    If a part has both, diffusers prefers shards and transformers a single file. A shard 1 of 1 counts as a single file.
    """
    canonical = f"{part}/{stem}.safetensors"
    plain = f"{part}/{stem}{infix}.safetensors"
    single = {canonical: plain} if plain in names else {}
    shards: dict[str, str] = {}
    for index in (f"{part}/{stem}.safetensors.index{infix}.json", f"{part}/{stem}{infix}.safetensors.index.json"):
        if index in names and not shards:
            listed = _json(source, index).get("weight_map")
            wanted = {f"{part}/{shard}" for shard in listed.values()} if isinstance(listed, dict) else set()
            if wanted and wanted <= set(names):
                shards = {name: name for name in sorted(wanted)} | {f"{canonical}.index.json": index}
    spellings = (f"{stem}{infix}-00001-of-00001", f"{stem}-00001-of-00001{infix}")
    only_shard = [f"{part}/{name}.safetensors" for name in spellings]
    only = next(({canonical: name} for name in only_shard if name in names), {})
    return (single or shards or only) if stem == "model" else (shards or single or only)


def _why_no_weights(part: str, names: Iterable[str]) -> str:
    files = sorted(Path(name).name for name in names)
    if any("-of-" in file and file.endswith(".safetensors") for file in files):
        return f"lacks shards, or the index, of the .safetensors weights in {part}/. Get the complete model."
    safe = [file for file in files if file.endswith(".safetensors")]
    if safe:
        return f"has {part} only as {', '.join(safe)}, which cannot be loaded. Save it in full or fp16 precision."
    other = [file for file in files if file.endswith((".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx"))]
    if other:
        return f"has no .safetensors weights in {part}/, but {', '.join(other)}, which may contain code. {CONVERT}"
    return f"has no .safetensors weights in {part}/. Get the complete model."


def _check_tokenizer(title: str, part: str, names: Collection[str]) -> None:
    files = {Path(name).name for name in names}
    if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files:
        return
    if "spiece.model" not in files:
        raise DataError(f"{title} has no vocabulary in {part}/. Get the complete model.")
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        raise DataError(
            f"{title} has {part}/spiece.model, which needs the library sentencepiece. Run `pip install "
            "'sentencepiece<0.2.2'`."
        ) from None


def _index(source: Source) -> dict[str, Any]:
    if families.INDEX in source.sizes:
        return _json(source, families.INDEX)
    root = [name for name in source.sizes if "/" not in name]
    if any("lora" in name.lower() or name.startswith("adapter_") for name in root):
        raise DataError(
            f"{source.title} holds only LoRA weights. Fuse them into their base model as docs/models.md shows, and set "
            "prepare_backbone.source to the new directory."
        )
    if "config.json" in root:
        config = _json(source, "config.json")
        names = [config.get("_class_name"), *(config.get("architectures") or [])]
        kind = next((name for name in names if name), "model")
        raise DataError(f"{source.title} is only part of a model (a {kind}), not a pipeline. {families.SUPPORTED}")
    checkpoints = [name for name in root if name.endswith((".safetensors", ".ckpt", ".gguf"))]
    if checkpoints:
        raise DataError(f"{source.title} holds a single-file model ({checkpoints[0]}). {CONVERT}")
    raise DataError(f"{source.title} is not a diffusers pipeline (it has no {families.INDEX}). {families.SUPPORTED}")


def _json(source: Source, name: str) -> dict[str, Any]:
    path = source.read(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise system_errors.refusal(error, path) or DataError(
            f"{name} of {source.title} is not JSON ({error}). Get the complete model."
        ) from None
    if not isinstance(content, dict):
        problem = f"{name} of {source.title} is not a JSON object (it holds a {type(content).__name__})"
        raise DataError(f"{problem}. Get the complete model.")
    return content


def _is_weight_index(name: str) -> bool:
    return ".safetensors.index" in name or any(mark in name for mark in (".fp16.", ".bf16.", ".non_ema."))
