"""What feature sets a project has: finished ones, those in the making, and broken ones among them."""

import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import PipelineError
from pipeline.feature_store.reader import read_manifest
from pipeline.feature_store.schema import FileEntry, Manifest, Plan
from pipeline.feature_store.writer import DELIVERED, PLAN, count_finished
from pipeline.io.system_errors import SystemRefusal, entries, reading, status

_LEFT_OVER = {
    ".tmp": "is being put together, or was when its process was killed: delete it if none is running",
    ".old": "stood in the place of {0} when a process that replaced it was killed: rename it if {0} is gone, else "
    "delete it",
}


@dataclass(frozen=True)
class Summary:
    """One set in a line; all but name, path and state are None where the set cannot be read."""

    name: str
    path: str
    state: str  # "complete", "2 of 3 shards", or what is wrong
    dataset: str | None = None
    backbone: str | None = None
    timestep: int | None = None
    layers: list[str] | None = None
    dims: int | None = None
    prompts: int | None = None
    rows: int | None = None
    bytes: int | None = None
    fingerprint: str | None = None


def folders(sets: Path) -> list[Path]:
    """The folders of finished sets in `sets`, by name; not those of a set that is being put together or replaced."""
    return [path for path in _folders(sets) if path.suffix not in _LEFT_OVER]


def finished(sets: Path) -> list[Summary]:
    """The sets in the folder `sets`, by name."""
    return [_summarise(path) for path in folders(sets)]


def left_over(sets: Path) -> list[Summary]:
    """What stands in `sets` beside the sets while one is put together, and stays if that is killed."""
    found = [path for path in _folders(sets) if path.suffix in _LEFT_OVER]
    return [Summary(path.name, str(path), _LEFT_OVER[path.suffix].format(path.stem)) for path in found]


def in_the_making(staging: Path) -> list[Summary]:
    """Unfinished extractions, which the same command continues."""
    found = []
    for path in _folders(staging):
        try:
            if status(path / DELIVERED):
                continue
            with reading(path / PLAN):
                plan = TypeAdapter(Plan).validate_json((path / PLAN).read_bytes())
            done = count_finished(path, plan)
            size = sum(file.stat().st_size for file in entries(path) if file.suffix == ".h5")
        except SystemRefusal as refused:
            found.append(Summary(path.name, str(path), str(refused)))
            continue
        except (OSError, ValidationError):
            continue  # another program's, or of an earlier version: extraction does not read it either; or just gone
        state = f"{done} of {plan.num_shards} shards: run `pipeline extract-features` with the same settings"
        found.append(_describe(path.name, path, state, plan, size))
    return found


def _summarise(path: Path) -> Summary:
    try:
        manifest = read_manifest(path)
        sizes = {entry.file: found.st_size for entry in manifest.files if (found := status(path / entry.file))}
        here = [entry for entry in manifest.files if entry.file in sizes]
        return _describe(path.name, path, _state(path, manifest, here), manifest.plan, sum(sizes.values()))
    except SystemRefusal as refused:
        return Summary(path.name, str(path), str(refused))
    except PipelineError as error:
        return Summary(path.name, str(path), f"broken: {error}")


def _folders(folder: Path) -> list[Path]:
    return [path for path in entries(folder) if (found := status(path)) and stat.S_ISDIR(found.st_mode)]


def _state(path: Path, manifest: Manifest, here: list[FileEntry]) -> str:
    """Of a set's files by their sizes: complete, here in part as after a `dvc pull` of some, or broken."""
    have, want = len(manifest.shards), manifest.num_shards
    if have != want:
        return f"broken: its manifest has {have} of {want} shards: run `pipeline extract-features`"
    if wrong := next(filter(None, (entry.size_fault(path) for entry in here)), None):
        return f"broken: {wrong}"
    if len(here) == want + 1:
        return "complete"
    if manifest.basis not in here:
        return "basis.h5 is missing: `dvc pull` it"
    return f"{len(here) - 1} of {want} shards here: `dvc pull` the others"


def _describe(name: str, path: Path, state: str, plan: Plan, size: int) -> Summary:
    content, made_by = plan.content, plan.provenance
    backbone = made_by.get("backbone", {})
    revision = backbone.get("revision")
    return Summary(
        name=name,
        path=str(path),
        state=state,
        dataset=made_by.get("dataset"),
        backbone=f"{backbone.get('name')}" + (f"@{revision[:8]}" if revision else ""),
        timestep=content.timestep,
        layers=list(content.layers),
        dims=content.num_dims,
        prompts=content.prompts_per_image,
        rows=plan.rows,
        bytes=size,
        fingerprint=plan.content.fingerprint,
    )
