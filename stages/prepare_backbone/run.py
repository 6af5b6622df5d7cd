"""Runs the stage: puts a diffusers pipeline directory at models/<name> and writes down exactly what it is.

The weights are neither DVC's nor git's: a team shares features, and whoever has those trains without the weights.
What DVC tracks is the manifest, with the hash of every file that decides the features.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path

from pipeline import atomic, provenance
from pipeline.config import Config
from pipeline.errors import PipelineError

log = logging.getLogger(__name__)

_EMBEDDED = Path(__file__).parent / "tiny-sd"
_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
_PARTS = ("unet", "transformer", "vae", "scheduler", *_TEXT)
_SUFFIXES = (".json", ".txt", ".model", ".safetensors")
_FILES = ("model_index.json", *(f"{part}/*{suffix}" for part in _PARTS for suffix in _SUFFIXES))
_VARIANTS = ("*.fp16.*", "*.bf16.*", "*.non_ema.*")
"""Other precisions and training states of the same weights, which are never loaded."""


def run(config: Config, train: bool = False) -> Path:
    """Makes models/<name> from the source that params.yaml names.

    Args:
        config: the project's configuration.
        train: train tiny-sd anew instead of copying its shipped weights.

    Returns:
        The manifest's path.

    Raises:
        PipelineError: the source is not there, cannot be downloaded, or lacks a part or its safetensors weights.
    """
    params = config.params.prepare_backbone
    target = config.backbone_dir
    if train and params.source != "embedded":
        raise PipelineError(f"--train makes tiny-sd: it goes with source: embedded, not {params.source}")
    directory = config.path(params.source)
    if train:
        from stages.prepare_backbone import tiny_sd

        tiny_sd.train(_emptied(target))
    elif params.source == "embedded":
        _copy(_EMBEDDED, target)
    elif directory.is_dir():
        _emptied(target).symlink_to(directory.resolve(), target_is_directory=True)
    else:
        _download(params.source, params.revision, target)
    files = _hash_files(target)
    provenance.write_json(
        _with_parent(config.backbone_manifest),
        {"name": params.name, "source": _public_name(params.source, directory), "revision": params.revision}
        | {"files": files},
    )
    log.info("%s: %d files", target, len(files))
    return config.backbone_manifest


def _copy(source: Path, target: Path) -> None:
    with atomic.folder_in_place_of(target) as folder:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            copy = _with_parent(folder / file.relative_to(source))
            shutil.copyfile(file, copy)
            atomic.sync(copy)


def _download(hub_id: str, revision: str | None, target: Path) -> None:
    """Fetches the safetensors weights of the parts we need; what is there of the same revision is not fetched again."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise PipelineError(f"prepare_backbone.source = {hub_id!r} is neither embedded, nor a directory, nor a hub id")
    if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
        raise PipelineError(
            f"set prepare_backbone.revision to a commit of {hub_id}, 40 hexadecimal digits (its page on the hub lists "
            "them): a branch or tag could move, and the model change under the features"
        )
    from huggingface_hub import snapshot_download

    mark, model = target.with_name(f".{target.name}.source"), f"{hub_id}@{revision}"
    if target.is_symlink() or not mark.exists() or mark.read_text(encoding="utf-8") != model:
        _emptied(target)  # the hub's client would take any folder that stands there for the model
        mark.write_text(model, encoding="utf-8")
    try:
        snapshot_download(
            hub_id, revision=revision, allow_patterns=list(_FILES), ignore_patterns=list(_VARIANTS), local_dir=target
        )
    except Exception as error:  # the hub's client raises many unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PipelineError(
            f"cannot download {hub_id} at {revision} from the model hub ({reason}): check the network and the id, "
            "or set prepare_backbone.source to a directory that holds the model"
        ) from None


def _hash_files(directory: Path) -> dict[str, str]:
    """SHA-256 of each file that decides the features, by its path inside the directory."""
    found = {path for pattern in _FILES for path in directory.glob(pattern)}
    files = sorted(path for path in found if not any(path.match(variant) for variant in _VARIANTS))
    present = {path.relative_to(directory).as_posix() for path in files}
    for part in _models(directory):
        if not any(name.startswith(f"{part}/") and name.endswith(".safetensors") for name in present):
            raise PipelineError(f"{directory}/{part} has no .safetensors weights (other formats are not loaded)")
    return {path.relative_to(directory).as_posix(): provenance.file_sha256(path) for path in files}


def _models(directory: Path) -> list[str]:
    """The parts that have weights, as model_index.json lists them: a denoiser, the VAE, any text encoders."""
    index_file = directory / "model_index.json"
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        parts = [part for part in _PARTS if (index.get(part) or [None])[0] is not None]
    except FileNotFoundError:
        raise PipelineError(f"{directory} is not a diffusers pipeline directory: it has no model_index.json") from None
    except (OSError, ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise PipelineError(f"{index_file} cannot be read ({error!r})") from None
    if "vae" not in parts or not {"unet", "transformer"} & set(parts):
        raise PipelineError(
            f"{index_file} names no vae, or neither a unet nor a transformer: no latent diffusion model"
        )
    return [part for part in parts if part.startswith(("unet", "transformer", "vae", "text_encoder"))]


def _public_name(source: str, directory: Path) -> str:
    """The source as others should read it: a directory's last name, not where it stands on this machine."""
    return directory.name if directory.is_dir() else source


def _emptied(target: Path) -> Path:
    if target.is_symlink():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    return _with_parent(target)


def _with_parent(path: Path) -> Path:
    os.makedirs(path.parent, exist_ok=True)
    return path
