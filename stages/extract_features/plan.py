"""Plan an extraction from the configuration, the data set and the model's hashes; no model is loaded."""

import logging
from dataclasses import dataclass
from pathlib import Path

from pipeline import devices, provenance
from pipeline.data.datasets import PreparedDataset
from pipeline.diffusion import backbones, frozen_model, prompts, representation, seen_images
from pipeline.diffusion.frozen_model import BackboneManifest
from pipeline.diffusion.prompts import PromptSet
from pipeline.errors import ConfigError
from pipeline.feature_store import Content, Plan
from pipeline.settings.config import Config
from pipeline.settings.params import ExtractFeatures, Runtime
from stages.extract_features import basis

log = logging.getLogger(__name__)

EXTRACTION_VERSION = 1
"""Raise it, here and in params.yaml, whenever the features change; tests compare golden features with it."""


@dataclass(frozen=True)
class ExtractionPlan:
    """Everything that an extraction reads, resolved to paths and sections."""

    settings: ExtractFeatures
    runtime: Runtime
    dataset: PreparedDataset
    prompts: PromptSet
    model_dir: Path
    image_encoder: Path | None  # its folder; None without image conditioning
    shared_basis: Path | None  # the basis.h5 to use; None if a basis is to be fitted
    feature_set: Plan  # content, size and provenance of the set
    target: Path  # the set's folder
    state_dir: Path  # folder of unfinished and cached work
    device: str

    @property
    def staging(self) -> Path:
        """The folder of the set until it is finished."""
        name = f"{self.feature_set.content.fingerprint[:16]}-{self.feature_set.rows_per_shard}"
        return self.state_dir / "staging" / name


def make(config: Config) -> ExtractionPlan:
    """Plan the feature set that params.yaml describes; raise PipelineError as `run` does."""
    settings = config.params.extract_features
    if settings.version != EXTRACTION_VERSION:
        raise ConfigError(
            f"params.yaml has extract_features.version: {settings.version}, but this program computes version "
            f"{EXTRACTION_VERSION}. Set it to extract again, or use the program that made your features."
        )
    dataset = PreparedDataset(config.dataset_dir)
    manifest = frozen_model.read_checked(config.backbone_manifest, config.backbone_dir)
    channels = _check_model(settings, config.backbone_dir, manifest)
    columns = representation.column_ranges(channels, settings.dims)
    prompt_set = prompts.build(settings, dataset.class_names, config.path)
    encoder = config.path(settings.image_conditioning) if settings.image_conditioning else None
    shared = None if settings.basis == "auto" else config.path(settings.basis)
    if shared:
        basis.read_shared(shared, channels, columns)
    content = Content(
        extraction_version=settings.version,
        dataset_hash=dataset.hash,
        class_names=dataset.class_names,
        # model_index.json only lists the parts, whose own files have hashes.
        backbone={name: sha256 for name, sha256 in manifest.files.items() if name != "model_index.json"},
        layers=columns,
        prompts=prompt_set.texts,
        positive=prompt_set.positive,
        image_conditioning=frozen_model.image_encoder_hashes(encoder),
        basis_images=None if shared else settings.basis_images,
        basis_sha256=provenance.file_sha256(shared) if shared else None,
        **settings.model_dump(
            include={"timestep", "image_size", "denoise_prompt", "negatives", "noise_seed", "dtype", "storage"}
        ),
    )
    made_by = {
        "dataset": dataset.name,
        "backbone": manifest.origin() | ({"variant": manifest.variant} if manifest.variant else {}),
        **_seen_images(dataset, manifest),
        "settings": settings.model_dump(mode="json"),
        **provenance.software(),
    }
    return ExtractionPlan(
        settings=settings, runtime=config.params.runtime, dataset=dataset, prompts=prompt_set,
        model_dir=config.backbone_dir, image_encoder=encoder, shared_basis=shared,
        feature_set=Plan(content, dataset.rows("train"), settings.rows_per_shard, made_by),
        target=config.features_dir, state_dir=config.state_dir, device=devices.resolve(config.params.runtime.device),
    )  # fmt: skip


def _seen_images(dataset: PreparedDataset, manifest: BackboneManifest) -> dict[str, int]:
    """Return the number of the data set's images that the backbone was trained on, if its manifest says on which."""
    if manifest.training is None:
        return {}
    if seen := seen_images.count(dataset, manifest.training):
        log.warning(
            "%s was trained on %d of the images of %s (its corpus is %s). train-fl refuses features of images that the "
            "backbone has seen: see docs/guide.md", manifest.name, seen, dataset.path, manifest.training.corpus,
        )  # fmt: skip
    return {"seen_images": seen}


def _check_model(settings: ExtractFeatures, model_dir: Path, manifest: BackboneManifest) -> dict[str, int]:
    """Check that the settings fit the model, and return the channels of each layer."""
    channels = backbones.layer_channels(model_dir, settings.layers)
    backbones.check_timesteps(model_dir, [settings.timestep], "extract_features.timestep")
    backbones.check_image_size(model_dir, settings.image_size)
    if manifest.variant and settings.dtype == "float32":
        log.warning(
            f"Features are computed in float32 from the {manifest.variant} weights of {manifest.name}. For full "
            "weights, set prepare_backbone.variant to none and run `pipeline prepare-backbone`."
        )
    return channels
