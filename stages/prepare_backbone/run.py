"""Run the stage: put a diffusers pipeline directory at models/<name> and record its files in a manifest.

Neither git nor DVC tracks the weights: a team shares features, and training from those needs no weights. DVC tracks the
manifest, with the hash of every file that affects the features. The directory holds links, to the hub's cache or to the
directory that params.yaml names, or a guide that was trained here, and is replaced only when the new model is complete.

directory.py, selection.py                       models of others
training/                                        guides that are trained here
tiny_sd.py, rendered_digits.py                   the training of tiny-sd and its images
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import devices, provenance
from pipeline.data.file_names import some
from pipeline.diffusion import frozen_model
from pipeline.diffusion.frozen_model import TRAINING, BackboneManifest, TrainingRecord
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.hub import address
from pipeline.hub.kinds import MODEL
from pipeline.io import atomic
from pipeline.settings.config import Config
from pipeline.settings.params import GuideTraining
from stages.prepare_backbone.directory import Directory
from stages.prepare_backbone.selection import Source, select

if TYPE_CHECKING:
    from stages.prepare_backbone.training.corpus import Corpus

log = logging.getLogger(__name__)

_EMBEDDED = Path(__file__).parent / "tiny-sd"


def run(config: Config, train: bool = False) -> Path:
    """Make models/<name> from the source that params.yaml names, and return the manifest's path.

    With `train`, tiny-sd is trained again instead of copying its shipped weights.

    Raises:
        ConfigError: The settings contradict each other, or name no model or commit; or a caption is too long.
        DataError: The source does not exist, cannot be downloaded, differs from the hub's hashes, or is not a
            supported model; or the corpus is missing, or has broken images or one class only.
        TrainingDiverged: A loss is not a finite number.
        PipelineError: Out of memory, or a file cannot be written.
    """
    params = config.params.prepare_backbone
    if train and params.source != "embedded":
        raise ConfigError(
            f"--train requires prepare_backbone.source: embedded (it is {params.source}). Set it, or omit --train."
        )
    target, directory = config.backbone_dir, config.path(params.source)
    if params.source != "train":
        _check_replaceable(target)
    if directory.is_file():
        raise ConfigError(
            f"{directory} is a file. Set prepare_backbone.source to the model's directory, which contains "
            "model_index.json."
        )
    if params.source == "embedded":
        found = {"name": params.name, "source": "embedded", "revision": None} | _embedded(config, train)
    elif params.source == "train":
        found = {"name": params.name, "source": "train", "revision": None} | _guide(config)
    elif directory.is_dir():
        found = {"name": params.name, "source": directory.name, "revision": None}
        found |= _linked(Directory(directory, target), target, params.variant, prefer_fp16=False)
    else:
        if address.is_path(params.source):
            places = " and ".join(str(place) for place in config.places(params.source))
            raise ConfigError(
                f"prepare_backbone.source = {params.source!r} does not exist (looked for {places}). Check the path, or "
                "write organisation/model for a model on the hub."
            )
        from pipeline.hub.repository import Repository

        hub_id, revision, _ = address.pinned(MODEL, params.source, params.revision)
        found = {"name": params.name, "source": hub_id, "revision": revision}
        model = Repository(MODEL, hub_id, revision, config.state_dir / "hub")
        half = config.params.extract_features.dtype in ("float16", "bfloat16")
        found |= _linked(model, target, params.variant, prefer_fp16=half)
    if found["revision"] is None and params.revision is not None:
        log.warning("prepare_backbone.revision is not used: it is for models from the hub")
    if params.source != "train" and config.corpus is not None:
        log.warning("prepare_backbone.corpus is not used: it is for source: train")
    _warn_about_changes(config, found)
    config.backbone_manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest = BackboneManifest(**found)
    absent = set() if manifest.training else {"training"}
    atomic.write_json(config.backbone_manifest, manifest.model_dump(mode="json", exclude=absent))
    log.info("%s: %d files", target, len(found["files"]))
    return config.backbone_manifest


def _check_replaceable(target: Path) -> None:
    """Raise ConfigError if another model would replace a trained guide."""
    if (target / TRAINING).is_file() and not (target / TRAINING).is_symlink():
        raise ConfigError(
            f"{target} holds a guide that was trained here, whose weights may exist nowhere else. Set another "
            "prepare_backbone.name, or move the folder away."
        )


def _embedded(config: Config, train: bool) -> dict[str, Any]:
    """Copy tiny-sd, so that the model does not depend on the program's installation, or train it."""
    if train:
        from stages.prepare_backbone import tiny_sd

        return {
            "variant": None,
            "files": _trained(config, tiny_sd.images(), tiny_sd.RECIPE, lambda folder, losses: None),
        }
    with atomic.replace_folder(config.backbone_dir) as folder:
        for file in filter(Path.is_file, _EMBEDDED.rglob("*")):  # copytree's error does not say that a disk is full
            copy = folder / file.relative_to(_EMBEDDED)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        hashes = _hashes_on_disk(folder)
    return {"variant": None, "files": hashes}


def _guide(config: Config) -> dict[str, Any]:
    """Train a guide on the corpus, unless models/<name> holds the one of these images and settings already."""
    from stages.prepare_backbone.training import corpus

    params, target, root = config.params.prepare_backbone, config.backbone_dir, config.corpus
    if root is None:
        raise ConfigError(
            f"prepare_backbone.source: train requires prepare_backbone.corpus (it is {params.corpus}). Set it to a "
            "folder of images, as <class>/<image>."
        )
    if params.name == "tiny-sd":
        raise ConfigError(
            "prepare_backbone.name is tiny-sd, but source: train makes another model. Set another name for it."
        )
    if root.is_relative_to(config.home / "data" / "raw"):
        log.warning("%s: DVC ignores data/raw, so it does not notice new images. Move them to data/corpus/", root)
    listing = config.state_dir / f"broken-images-{params.name}-corpus.txt"
    images = corpus.read(root, params.training.image_size, listing)
    settings = params.training.model_dump(mode="json")
    if record := _complete(target, images.sha256, settings):
        log.info("%s is complete already. To train it again, delete the folder", target)
        return {"variant": None, "files": record.weights, "training": record}
    names = some(images.class_names)  # those of a folder one level too high would be other captions
    log.info("%s: %d images of %d classes: %s", root, len(images.images), len(images.class_names), names)
    about: dict[str, Any] = {"corpus": root.name, "corpus_sha256": images.sha256, "images": images.images_per_class()}
    about |= {"settings": settings, "hashes": images.hashes()}

    def describe(folder: Path, found: Mapping[str, Any]) -> None:
        atomic.write_json(folder / TRAINING, TrainingRecord(**about, **found).model_dump(mode="json"))

    files = _trained(config, images, params.training, describe)
    return {"variant": None, "files": files, "training": frozen_model.read_training(target / TRAINING)}


def _trained(
    config: Config, images: "Corpus", settings: GuideTraining, describe: Callable[[Path, dict[str, Any]], None]
) -> dict[str, str]:
    """Train a guide, or resume, and write it to models/<name>; return the SHA-256 of each file that is loaded.

    `describe` is called with the folder, and losses and weights of its `TrainingRecord`, before it is in its place.
    """
    from stages.prepare_backbone.training.run import trained
    from stages.prepare_backbone.training.trainer import Machine

    runtime, name = config.params.runtime, config.params.prepare_backbone.name
    machine = Machine(devices.resolve(runtime.device), runtime.compile)
    pictures = config.root / "analysis" / f"{name}-samples.png"  # outside the model's folder
    seconds = 60 * runtime.guide_checkpoint_minutes
    with (
        trained(images, settings, machine, config.state_dir, pictures, seconds) as trainer,
        atomic.replace_folder(config.backbone_dir) as folder,
    ):
        trainer.save(folder)
        hashes = _hashes_on_disk(folder)
        describe(folder, {"losses": trainer.losses, "weights": hashes})
    return hashes


def _complete(target: Path, corpus_sha256: str, settings: dict[str, Any]) -> TrainingRecord | None:
    """Return the record of the guide in a folder if it was made from these and is intact; else None."""
    try:
        record = frozen_model.read_training(target / TRAINING)
        intact = all(provenance.file_sha256(target / name) == sha256 for name, sha256 in record.weights.items())
    except (DataError, FileNotFoundError):
        return None
    return record if intact and (record.corpus_sha256, record.settings) == (corpus_sha256, settings) else None


def _hashes_on_disk(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a model that is loaded, when all are on the disk."""
    files = select(Directory(folder), "auto", prefer_fp16=False).files
    for name in files:
        atomic.sync_to_disk(folder / name)
    return {name: provenance.file_sha256(folder / name) for name in files}


def _linked(source: Source, target: Path, variant: str, prefer_fp16: bool) -> dict[str, Any]:
    """Make a folder of absolute links to the files that are loaded, under their canonical names."""
    selection = select(source, variant, prefer_fp16)
    record = frozen_model.read_training(source.read(TRAINING)) if TRAINING in source.sizes else None
    files = selection.files | ({TRAINING: TRAINING} if record else {})
    found = source.fetch(list(files.values()))
    with atomic.replace_folder(target) as folder:
        for canonical, name in files.items():
            link = folder / canonical
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(found[name][0])
    target.with_name(f".{target.name}.source").unlink(missing_ok=True)  # of versions that downloaded into models/
    log.info("%s: %s, weights: %s", source.title, selection.family, selection.variant or "full")
    hashes = {canonical: found[name][1] for canonical, name in selection.files.items()}
    return {"variant": selection.variant, "files": hashes, "training": record}


def _warn_about_changes(config: Config, found: Mapping[str, Any]) -> None:
    """Warn if another model was prepared under this name, because earlier features are not from the new one."""
    try:
        before = frozen_model.read_manifest(config.backbone_manifest)
    except PipelineError:
        return
    old, new = before.files, found["files"]
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed and all(getattr(before, key) == found[key] for key in ("source", "revision")):
        log.warning(
            "%s is another model than the one prepared before from the same source: %s changed. Features that were "
            "extracted before do not belong to it", found["name"], ", ".join(changed),
        )  # fmt: skip
