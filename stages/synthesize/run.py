"""Runs the stage: images of every class from the frozen model, as a prepared data set.

`synthesize.images_per_class` images of a class are its training split; one more is its test split, so that the set is
a data set like any other. With 0, the value for everyone who does not balance clients, nothing is generated and the
folder says so. Classes are kept under .pipeline as they are finished: a killed run makes none twice.
"""

import logging
import shutil
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pipeline import devices, provenance
from pipeline.data import datasets
from pipeline.data.datasets import Images, PreparedDataset, Source
from pipeline.diffusion import frozen_model
from pipeline.io import atomic, locks
from pipeline.io.system_errors import reading
from pipeline.progress import track
from pipeline.settings.config import Config

log = logging.getLogger(__name__)


def run(config: Config) -> Path:
    """Generates images of the prepared data set's classes.

    Returns:
        Their folder.

    Raises:
        PipelineError: the data set or the model is missing or changed.
    """
    params, target = config.params.synthesize, config.synthetic_dir
    if params.images_per_class == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        atomic.write_json(target / "manifest.json", {"images_per_class": 0})
        _write_names(config, "no generated images")
        return target
    dataset = PreparedDataset(config.dataset_dir)
    weights = frozen_model.read_checked(config)["files"]
    content = {"params": params.model_dump(), "weights": weights, "classes": dataset.class_names}
    key = provenance.fingerprint(content | {"image_size": dataset.image_size})[:16]
    staging = config.state_dir / "synthesize" / key
    with locks.held(config.state_dir / "locks" / f"synthesize-{key}", str(target)):
        staging.mkdir(parents=True, exist_ok=True)
        classes = _generate(config, dataset, staging)
        splits = {
            "train": _split(classes, slice(0, params.images_per_class)),
            "test": _split(classes, slice(params.images_per_class, None)),
        }
        backbone = config.params.prepare_backbone.name
        source = Source(dataset.class_names, splits, f"as the terms of {backbone}, which generated the images")
        datasets.write(target, target.name, backbone, source)
        _write_names(config, f"{target.name} {PreparedDataset(target).hash}")
        shutil.rmtree(staging)
    log.info("%s: %d images of each of %d classes", target, params.images_per_class, len(classes))
    return target


def _write_names(config: Config, text: str) -> None:
    """What training depends on under DVC, whichever of the rules it balances clients by."""
    for file in config.synthetic_names:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, f"{text}\n")


def _generate(config: Config, dataset: PreparedDataset, staging: Path) -> list[np.ndarray]:
    """Per class its images, uint8 (images_per_class + 1, H, W, 3); what stands in `staging` is not made again."""
    params, runtime = config.params.synthesize, config.params.runtime
    files = [staging / f"class-{label:05d}.safetensors" for label in range(len(dataset.class_names))]
    generator = None
    for label, file in enumerate(track(files, "synthesize", len(files), "class")):
        if _is_whole(file):
            continue
        if generator is None:
            from stages.synthesize.generate import Generator

            generator = Generator(
                config.backbone_dir,
                params,
                dataset.image_size,
                runtime.synthesize_batch_size,
                devices.resolve(runtime.device),
            )
        images = generator(label, dataset.class_names[label], params.images_per_class + 1)
        _save(file, np.ascontiguousarray(images))  # the format's writer takes the buffer as it lies
    return [load_file(file)["images"] for file in files]


def _save(file: Path, images: np.ndarray) -> None:
    with atomic.replace_file(file) as temporary:
        try:
            save_file({"images": images, "crc32": np.array([zlib.crc32(images.data)], np.uint32)}, temporary)
        except SafetensorError as error:  # a full disk, among others
            raise OSError(str(error)) from None


def _is_whole(file: Path) -> bool:
    """Whether the images of a class are there as they were written.

    Raises:
        SystemRefusal: the operating system did not let them be read.
    """
    try:
        with reading(file):
            file.open("rb").close()  # safetensors takes every file that it cannot open for a missing one
            found = load_file(file)
        return zlib.crc32(found["images"].data) == found["crc32"][0]
    except (OSError, KeyError, IndexError, BufferError, SafetensorError):
        return False


def _split(classes: list[np.ndarray], rows: slice) -> Images:
    chosen = [images[rows] for images in classes]
    labels = np.repeat(np.arange(len(chosen)), [len(images) for images in chosen])
    return Images.of_one_domain(np.concatenate(chosen), labels)
