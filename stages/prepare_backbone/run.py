"""Run the stage: put a diffusers pipeline directory at models/<name> and record its files in a manifest.

Neither git nor DVC tracks the weights: a team shares features, and training from those needs no weights. DVC tracks the
manifest, with the hash of every file that affects the features. The directory holds links, to the hub's cache or to the
directory that params.yaml names, and is replaced only when the new model is complete.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import provenance
from pipeline.diffusion import frozen_model
from pipeline.diffusion.frozen_model import BackboneManifest
from pipeline.errors import ConfigError, PipelineError
from pipeline.io import atomic
from pipeline.settings.config import Config
from stages.prepare_backbone import address
from stages.prepare_backbone.directory import Directory
from stages.prepare_backbone.selection import Source, select

log = logging.getLogger(__name__)

_EMBEDDED = Path(__file__).parent / "tiny-sd"


def run(config: Config, train: bool = False) -> Path:
    """Make models/<name> from the source that params.yaml names, and return the manifest's path.

    With `train`, tiny-sd is trained again instead of copying its shipped weights.

    Raises:
        ConfigError: The settings contradict each other, or name no model or commit.
        DataError: The source does not exist, cannot be downloaded, differs from the hub's hashes, or is not a
            supported model.
    """
    params = config.params.prepare_backbone
    if train and params.source != "embedded":
        raise ConfigError(
            f"--train requires prepare_backbone.source: embedded (it is {params.source}). Set it, or omit --train."
        )
    target, directory = config.backbone_dir, config.path(params.source)
    if params.source == "embedded":
        found = {"name": params.name, "source": "embedded", "revision": None} | _embedded(target, train)
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
        from stages.prepare_backbone.hub import HubModel

        hub_id, revision = address.pinned(params.source, params.revision)
        found = {"name": params.name, "source": hub_id, "revision": revision}
        model = HubModel(hub_id, revision, config.state_dir / "hub")
        half = config.params.extract_features.dtype in ("float16", "bfloat16")
        found |= _linked(model, target, params.variant, prefer_fp16=half)
    if found["revision"] is None and params.revision is not None:
        log.warning("prepare_backbone.revision is not used: it is for models from the hub")
    _warn_about_changes(config, found)
    config.backbone_manifest.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(config.backbone_manifest, BackboneManifest(**found).model_dump())
    log.info("%s: %d files", target, len(found["files"]))
    return config.backbone_manifest


def _embedded(target: Path, train: bool) -> dict[str, Any]:
    """Copy tiny-sd, so that the model does not depend on the program's installation, or train it."""
    with atomic.replace_folder(target) as folder:
        if train:
            from stages.prepare_backbone import tiny_sd

            tiny_sd.train(folder)
        else:
            for file in filter(Path.is_file, _EMBEDDED.rglob("*")):  # copytree's error does not say that a disk is full
                copy = folder / file.relative_to(_EMBEDDED)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        files = select(Directory(folder), "auto", prefer_fp16=False).files
        hashes = {name: provenance.file_sha256(folder / name) for name in files}
        for name in files:
            atomic.sync_to_disk(folder / name)
    return {"variant": None, "files": hashes}


def _linked(source: Source, target: Path, variant: str, prefer_fp16: bool) -> dict[str, Any]:
    """Make a folder of absolute links to the files that are loaded, under their canonical names."""
    selection = select(source, variant, prefer_fp16)
    found = source.fetch(list(selection.files.values()))
    with atomic.replace_folder(target) as folder:
        for canonical, name in selection.files.items():
            link = folder / canonical
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(found[name][0])
    target.with_name(f".{target.name}.source").unlink(missing_ok=True)  # of versions that downloaded into models/
    log.info("%s: %s, weights: %s", source.title, selection.family, selection.variant or "full")
    hashes = {canonical: found[name][1] for canonical, name in selection.files.items()}
    return {"variant": selection.variant, "files": hashes}


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
