"""Generate images of every class with the frozen model, as a prepared data set.

`synthesize.images_per_class` images per class are the training split; one more is the test split, because every data
set has one. With 0, for experiments that do not balance clients, nothing is generated and the manifest says so.
Finished classes are stored under .pipeline, so that an interrupted run resumes.
"""

import logging
import shutil
from pathlib import Path

import numpy as np
import torch

from pipeline import devices, provenance
from pipeline.data import datasets
from pipeline.data.datasets import Images, PreparedDataset, Source
from pipeline.diffusion import frozen_model, seen_images
from pipeline.diffusion.frozen_model import TrainingRecord
from pipeline.errors import ConfigError
from pipeline.io import atomic, locks
from pipeline.io.resumable import ResumableStore
from pipeline.progress import track
from pipeline.settings.config import Config

log = logging.getLogger(__name__)


def run(config: Config) -> Path:
    """Generate images of the prepared data set's classes, and return their folder.

    Raises:
        ConfigError: The model was trained on images of the data set.
        PipelineError: The data set or the model is missing or changed.
    """
    params, target = config.params.synthesize, config.synthetic_dir
    if params.images_per_class == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        atomic.write_json(target / "manifest.json", {"images_per_class": 0})
        _write_names(config, "no generated images")
        return target
    dataset = PreparedDataset(config.dataset_dir)
    backbone_manifest = frozen_model.read_checked(config.backbone_manifest, config.backbone_dir)
    if backbone_manifest.training and not config.params.train_fl.allow_seen_images:
        _refuse_seen_images(dataset, backbone_manifest.name, backbone_manifest.training)
    weights = backbone_manifest.files
    content = {"params": params.model_dump(), "weights": weights, "classes": dataset.class_names}
    key = provenance.fingerprint(content | {"image_size": dataset.image_size})[:16]
    store = ResumableStore(config.state_dir / "synthesize" / key)
    with locks.held(config.state_dir / "locks" / f"synthesize-{key}", str(target)):
        classes = _generate(config, dataset, store)
        count = params.images_per_class
        splits = {"train": _split(classes, slice(0, count)), "test": _split(classes, slice(count, None))}
        backbone = config.params.prepare_backbone.name
        source = Source(dataset.class_names, splits, f"as the terms of {backbone}, which generated the images")
        datasets.write(target, target.name, backbone, source)
        _write_names(config, f"{target.name} {PreparedDataset(target).hash}")
        store.remove()
    log.info("%s: %d images of each of %d classes", target, params.images_per_class, len(classes))
    return target


def _refuse_seen_images(dataset: PreparedDataset, name: str, training: TrainingRecord) -> None:
    """Raise ConfigError if the model was trained on images of the data set, which it may have memorised."""
    if seen := seen_images.count(dataset, training):
        raise ConfigError(
            f"{name} was trained on {seen} of the images of {dataset.path}, and may generate them again. Train it on "
            "other images, or set train_fl.allow_seen_images to true and say so with the results."
        )


def _write_names(config: Config, text: str) -> None:
    """Write the files by which DVC knows that training depends on these images."""
    for file in config.synthetic_names:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, f"{text}\n")


def _generate(config: Config, dataset: PreparedDataset, store: ResumableStore) -> list[np.ndarray]:
    """Return the images of each class, uint8 (images_per_class + 1, H, W, 3); finished classes come from the store."""
    params, runtime = config.params.synthesize, config.params.runtime
    generator, classes = None, []
    for label, class_name in enumerate(track(dataset.class_names, "synthesize", len(dataset.class_names), "class")):
        name = f"class-{label:05d}"
        if (unit := store.load(name)) is not None:
            classes.append(unit[0]["images"].numpy())
            continue
        if generator is None:
            # The model is loaded only if a class is missing.
            from stages.synthesize.generate import Generator

            sizes = dataset.image_size, runtime.synthesize_batch_size
            generator = Generator(config.backbone_dir, params, *sizes, devices.resolve(runtime.device))
        classes.append(generator(label, class_name, params.images_per_class + 1))
        store.save(name, {"images": torch.from_numpy(classes[-1])})
    return classes


def _split(classes: list[np.ndarray], rows: slice) -> Images:
    chosen = [images[rows] for images in classes]
    labels = np.repeat(np.arange(len(chosen)), [len(images) for images in chosen])
    return Images.of_one_domain(np.concatenate(chosen), labels)
