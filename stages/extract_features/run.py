"""Runs stage 1: every training image through the frozen model once per prompt, into a checked, resumable feature set.

Per image the VAE encodes once, one noise is drawn from a generator keyed by (noise_seed, index) and shared by all its
prompts, and the pairs (image, prompt) fill UNet batches of a fixed size. Features therefore do not depend on batch
size, shard size or order, up to the float16 rounding of sums that a batch's shape may reorder.
"""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from pipeline import feature_store, provenance, seeding
from pipeline.config import Config
from pipeline.datasets import Images, PreparedDataset
from pipeline.errors import PipelineError
from pipeline.feature_store import Basis, Content, Features, FeatureSetWriter, LayerBasis, Manifest
from pipeline.progress import progress_bar
from stages.extract_features import prompts, representation
from stages.extract_features.backbone import StableDiffusionBackbone, decoder_channels
from stages.extract_features.representation import Moments, Projector

log = logging.getLogger(__name__)

EXTRACTION_VERSION = 1
"""Raise it, here and in params.yaml, whenever the features change; tests hold golden features against it."""


def run(config: Config) -> Path:
    """Extracts the feature set that params.yaml describes, continuing where a killed run stopped.

    Returns:
        Its folder.

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
    manifest = _plan(config, dataset)
    target = config.features_dir
    if _is_complete(target, manifest):
        log.info("%s is complete already", target)
        return target
    staging = _staging_root(config) / f"{manifest.fingerprint[:16]}-{manifest.rows_per_shard}"
    with feature_store.lock(staging):
        writer = FeatureSetWriter(staging, manifest)
        if not manifest.complete:
            Extraction(config, dataset, writer).run()
        writer.publish(target)
    _drop_delivered(staging)
    return target


class Extraction:
    """One run of the frozen model over what a writer still lacks."""

    def __init__(self, config: Config, dataset: PreparedDataset, writer: FeatureSetWriter) -> None:
        """Loads the model and encodes the prompts."""
        self.params = config.params.extract_features
        self.batch_size = config.params.runtime.unet_batch_size
        self.writer = writer
        self.data = dataset.load("train")
        device = resolve_device(config.params.runtime.device)
        self.backbone = StableDiffusionBackbone(
            config.backbone_dir, self.params.up_block_indices, device, getattr(torch, self.params.dtype)
        )
        texts = prompts.class_prompts(self.params.prompt_template, dataset.class_names)
        self.prompt_embeds, pooled = self.backbone.encode_prompts([*texts, self.params.denoise_prompt])
        self.prompt_class = prompts.assign_prompts(self.data.labels, self.params.negatives, pooled[:-1])

    def run(self) -> None:
        """Computes the basis if it is missing, then the missing shards."""
        manifest = self.writer.manifest
        basis = self._basis()
        projector = Projector(basis.layers, self.backbone.device)
        missing = self.writer.missing_shards
        if len(missing) < manifest.num_shards:
            log.info("resuming: %d of %d shards are done", manifest.num_shards - len(missing), manifest.num_shards)
        images = sum(len(manifest.shard_rows(shard)) for shard in missing)
        started = time.perf_counter()
        with progress_bar(images, "extract", "image") as bar:
            for shard in missing:
                index = np.array(manifest.shard_rows(shard))
                self.writer.write_shard(shard, self._represent_shard(index, projector, bar))
        seconds = time.perf_counter() - started
        passes = images * (1 + manifest.prompts_per_image)
        log.info("%d images, %d UNet passes in %.1f s: %.1f images/s", images, passes, seconds, images / seconds)

    def _basis(self) -> Basis:
        if self.writer.manifest.basis:
            return feature_store.read_basis(self.writer.path, self.writer.manifest)
        rng = seeding.numpy_generator(self.params.noise_seed, "basis images")
        count = min(self.params.basis_images, len(self.data))
        basis = self._fit_basis(np.sort(rng.permutation(len(self.data))[:count]))
        self.writer.write_basis(basis)
        for name, layer in basis.layers.items():
            explained = layer.explained_variance.sum() / layer.total_variance
            log.info("basis of %s: %d dims explain %.1f %%", name, len(layer.components), 100 * explained)
        return basis

    def _fit_basis(self, index: np.ndarray) -> Basis:
        """Two passes over a sample of images: the layers' PCA, then mean and std of what it makes of them."""
        moments = {layer: Moments(channels) for layer, channels in self.backbone.channels.items()}
        noisy = self._noisy_latents(index)
        with progress_bar(2 * len(index), "fit basis", "image") as bar:
            for rows in _chunks(len(index), self.batch_size):
                for layer, maps in self._denoise(noisy[rows]).items():
                    moments[layer].update(maps.cpu())
                bar.update(len(noisy[rows]))
            layers: dict[str, LayerBasis] = {
                layer: representation.fit_basis(moments[layer], dims)
                for layer, dims in zip(moments, self.params.dims, strict=True)
            }
            projector = Projector(layers, self.backbone.device)
            denoised = []
            for rows in _chunks(len(index), self.batch_size):
                denoised.append(projector(self._denoise(noisy[rows])).double().cpu().numpy())
                bar.update(len(noisy[rows]))
        pooled = np.concatenate(denoised)  # (n, D)
        return Basis(layers, pooled.mean(0), pooled.std(0))

    def _denoise(self, noisy: torch.Tensor) -> dict[str, torch.Tensor]:
        generic = self.prompt_embeds[-1:].expand(len(noisy), -1, -1)
        return self.backbone.features(noisy, self.params.timestep, generic)

    def _represent_shard(self, index: np.ndarray, projector: Projector, bar) -> Features:
        """All representations of these images; pairs (image, prompt) are flattened into batches of one size."""
        noisy = self._noisy_latents(index)
        own = self.prompt_class[index]  # (n, P)
        generic = np.full((len(index), 1), len(self.prompt_embeds) - 1)
        text = torch.from_numpy(np.concatenate([generic, own], axis=1).astype(np.int64)).flatten()  # (n * (1+P),)
        image = torch.arange(len(index)).repeat_interleave(1 + own.shape[1])
        pooled = []
        for rows in _chunks(len(text), self.batch_size):
            embeds = self.prompt_embeds[text[rows].to(self.backbone.device)]
            maps = self.backbone.features(noisy[image[rows].to(noisy.device)], self.params.timestep, embeds)
            pooled.append(projector(maps).half().cpu().numpy())
            bar.update(len(text[rows]) / (1 + own.shape[1]))
        table = np.concatenate(pooled).reshape(len(index), 1 + own.shape[1], -1)  # (n, 1+P, D)
        return Features(index, self.data.labels[index], table[:, 0], table[:, 1:], own)

    def _noisy_latents(self, index: np.ndarray) -> torch.Tensor:
        """float32 (n, C, h, w) on the device: each image's latents under its own noise."""
        images: Images = self.data.take(index)
        latents = torch.cat(
            [
                self.backbone.encode_images(images.images[rows], self.params.image_size)
                for rows in _chunks(len(index), _VAE_BATCH)
            ]
        )
        noise = torch.stack(
            [
                torch.randn(
                    latents.shape[1:], generator=seeding.torch_generator(self.params.noise_seed, "noise", int(sample))
                )
                for sample in index
            ]
        )
        return self.backbone.add_noise(latents, noise.to(latents.device), self.params.timestep)


_VAE_BATCH = 32


def resolve_device(device: str) -> str:
    """The device to compute on; "auto" is the first GPU, or else the CPU."""
    if device != "auto":
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise PipelineError(f"runtime.device = {device}: this machine has no usable CUDA GPU; use auto or cpu")
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _plan(config: Config, dataset: PreparedDataset) -> Manifest:
    """The manifest of the set to extract, from the configuration, the data set and the backbone's hashes."""
    params = config.params.extract_features
    if len(params.dims) != len(params.up_block_indices):
        raise PipelineError(
            f"extract_features.dims = {params.dims} must have one entry for each of up_block_indices = "
            f"{params.up_block_indices}"
        )
    backbone = _checked_backbone(config)
    channels = decoder_channels(config.backbone_dir, params.up_block_indices)
    content = Content(
        extraction_version=params.version,
        dataset_hash=dataset.hash,
        class_names=dataset.class_names,
        backbone={name: sha for name, sha in backbone["files"].items() if name != "model_index.json"},
        layers=representation.column_ranges(channels, params.dims),
        **params.model_dump(
            include={
                "timestep",
                "image_size",
                "prompt_template",
                "denoise_prompt",
                "negatives",
                "noise_seed",
                "basis_images",
                "dtype",
            }
        ),
    )
    made_by = {
        "dataset": dataset.name,
        "backbone": {key: backbone[key] for key in ("name", "source", "revision")},
        **provenance.describe(resolve_device(config.params.runtime.device)),
    }
    count = prompts.prompts_per_image(params.negatives, len(dataset.class_names))
    return feature_store.new_manifest(content, dataset.rows("train"), params.rows_per_shard, count, made_by)


def _checked_backbone(config: Config) -> dict:
    """The backbone's manifest, after checking that the weights are those it names."""
    try:
        backbone = json.loads(config.backbone_manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{config.backbone_manifest} is missing: run `pipeline prepare-backbone`") from None
    for name, sha256 in backbone["files"].items():
        file = config.backbone_dir / name
        if not file.exists() or provenance.file_sha256(file) != sha256:
            problem = "differs from" if file.exists() else "is missing but named in"
            raise PipelineError(f"{file} {problem} {config.backbone_manifest}: run `pipeline prepare-backbone`")
    return backbone


def _is_complete(target: Path, planned: Manifest) -> bool:
    if not (target / "manifest.json").exists():
        return False
    try:
        found = feature_store.FeatureSet(target).manifest
    except PipelineError as error:
        log.warning("extracting anew: %s", error)
        return False
    return found.fingerprint == planned.fingerprint and found.rows_per_shard == planned.rows_per_shard


def _staging_root(config: Config) -> Path:
    """Outside every DVC out, because DVC deletes those before it runs a stage; under DVC, in the real repository."""
    return Path(os.environ.get("DVC_ROOT", config.root)) / ".pipeline" / "staging"


def _drop_delivered(current: Path) -> None:
    """Removes the staging folders of other sets that were finished, and so delivered; unfinished ones stay."""
    for other in current.parent.iterdir():
        if other == current or not (other / "manifest.json").exists():
            continue
        try:
            finished = feature_store.read_manifest(other).complete
        except PipelineError:
            continue
        if finished:
            shutil.rmtree(other, ignore_errors=True)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
