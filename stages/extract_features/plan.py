"""What is to be extracted: from the configuration, the data set and the backbone's hashes; no model is loaded."""

import logging
from dataclasses import dataclass
from pathlib import Path

from pipeline import devices, provenance
from pipeline.data.datasets import PreparedDataset
from pipeline.diffusion import backbones, frozen_model, prompts, representation
from pipeline.diffusion.prompts import PromptSet
from pipeline.errors import PipelineError
from pipeline.feature_store import Content, Plan
from pipeline.settings.config import Config
from stages.extract_features import basis

log = logging.getLogger(__name__)

EXTRACTION_VERSION = 1
"""Raise it, here and in params.yaml, whenever the features change; tests hold golden features against it."""


@dataclass(frozen=True)
class Job:
    """An extraction: the configuration, the data set, its prompts, the set they make, and the device."""

    config: Config
    dataset: PreparedDataset
    prompts: PromptSet
    plan: Plan
    device: str


def make(config: Config) -> Job:
    """Plans the feature set that params.yaml describes.

    Raises:
        PipelineError: the data set or the backbone is missing or changed, or the configuration does not fit them.
    """
    params = config.params.extract_features
    if params.version != EXTRACTION_VERSION:
        raise PipelineError(
            f"params.yaml has extract_features.version: {params.version}, but this program computes version "
            f"{EXTRACTION_VERSION}: set it to extract anew, or use the program that made your features"
        )
    dataset = PreparedDataset(config.dataset_dir)
    backbone = frozen_model.read_checked(config)
    channels = backbones.layer_channels(config.backbone_dir, params.layers)
    if len(params.dims) != len(channels):
        raise PipelineError(
            f"extract_features.dims = {params.dims} must have one entry for each of layers = {list(channels)}"
        )
    backbones.check_timesteps(config.backbone_dir, [params.timestep], "extract_features.timestep")
    backbones.check_image_size(config.backbone_dir, params.image_size)
    if backbone.get("variant") and params.dtype == "float32":
        log.warning(
            "features are computed in float32 from the %s weights of %s. For full weights set prepare_backbone.variant "
            "to none and run `pipeline prepare-backbone`",
            backbone["variant"], backbone["name"],
        )  # fmt: skip
    prompt_set = prompts.build(params, dataset.class_names, config.path)
    content = Content(
        extraction_version=params.version,
        dataset_hash=dataset.hash,
        class_names=dataset.class_names,
        backbone={name: sha for name, sha in backbone["files"].items() if name != "model_index.json"},
        layers=representation.column_ranges(channels, params.dims),
        prompts=prompt_set.texts,
        positive=prompt_set.positive,
        image_conditioning=frozen_model.image_encoder_hashes(config),
        basis_images=params.basis_images if params.basis == "auto" else None,
        basis_sha256=_hash_of_shared_basis(config, channels),
        **params.model_dump(include={"timestep", "image_size", "denoise_prompt", "negatives", "noise_seed", "dtype"}),
    )
    made_by = {
        "dataset": dataset.name,
        "backbone": {key: backbone[key] for key in ("name", "source", "revision")}
        | ({"variant": backbone["variant"]} if backbone.get("variant") else {}),
        "settings": params.model_dump(mode="json"),
        **provenance.software(),
    }
    plan = Plan(content, dataset.rows("train"), params.rows_per_shard, made_by)
    return Job(config, dataset, prompt_set, plan, devices.resolve(config.params.runtime.device))


def shared_basis(config: Config) -> Path | None:
    """The basis given from elsewhere; None if it is to be fitted."""
    path = config.params.extract_features.basis
    return None if path == "auto" else config.path(path)


def _hash_of_shared_basis(config: Config, channels: dict[str, int]) -> str | None:
    file = shared_basis(config)
    if file is None:
        return None
    basis.read_shared(file, channels, representation.column_ranges(channels, config.params.extract_features.dims))
    return provenance.file_sha256(file)
