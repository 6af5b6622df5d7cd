"""List a project's feature sets: finished, unfinished and broken ones."""

import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import PipelineError
from pipeline.feature_store.reader import read_manifest
from pipeline.feature_store.schema import FileEntry, Manifest, Plan
from pipeline.feature_store.writer import PLAN, PUBLISHED, count_finished
from pipeline.io.system_errors import SystemRefusal, entries, reading, status

_LEFT_OVER = {
    ".tmp": "is being written, or its process was killed. Delete it if no process is running.",
    ".old": "is an earlier {0}, left when a process that replaced it was killed. Rename it if {0} is gone; otherwise "
    "delete it.",
}


@dataclass(frozen=True)
class Summary:
    """A set in brief; all but name, path and state ("complete", or the problem) are None if it cannot be read."""

    name: str
    path: str
    state: str
    dataset: str | None = None
    backbone: str | None = None
    timestep: int | None = None
    layers: list[str] | None = None
    dims: int | None = None
    prompts: int | None = None
    rows: int | None = None
    bytes: int | None = None
    storage: str | None = None
    added_noise: float | None = None  # standard deviations
    fingerprint: str | None = None


def folders(sets: Path) -> list[Path]:
    """Return the folders in `sets` by name, without those of a set that is being written or replaced."""
    return [path for path in _folders(sets) if path.suffix not in _LEFT_OVER]


def finished(sets: Path) -> list[Summary]:
    """Summarise the sets in the folder `sets`, by name."""
    return [_summarise(path) for path in folders(sets)]


def leftovers(sets: Path) -> list[Summary]:
    """Summarise temporary folders in `sets`, which stay if a process is killed while it publishes a set."""
    found = [path for path in _folders(sets) if path.suffix in _LEFT_OVER]
    return [Summary(path.name, str(path), _LEFT_OVER[path.suffix].format(path.stem)) for path in found]


def unfinished(staging: Path) -> list[Summary]:
    """Summarise unfinished extractions, which the same command resumes."""
    found = []
    for path in _folders(staging):
        try:
            if status(path / PUBLISHED):
                continue
            with reading(path / PLAN):
                plan = TypeAdapter(Plan).validate_json((path / PLAN).read_bytes())
            done = count_finished(path, plan)
            size = sum(file.stat().st_size for file in entries(path) if file.suffix == ".h5")
        except SystemRefusal as refused:
            found.append(Summary(path.name, str(path), str(refused)))
            continue
        except (OSError, ValidationError):
            continue  # of another program or an earlier version, which extraction does not read either; or just removed
        state = f"{done} of {plan.num_shards} shards. Run `pipeline extract-features` with the same settings."
        found.append(_describe(path, state, plan, size))
    return found


def _summarise(path: Path) -> Summary:
    try:
        manifest = read_manifest(path)
        sizes = {entry.file: found.st_size for entry in manifest.files if (found := status(path / entry.file))}
        here = [entry for entry in manifest.files if entry.file in sizes]
        return _describe(path, _state(path, manifest, here), manifest.plan, sum(sizes.values()))
    except SystemRefusal as refused:
        return Summary(path.name, str(path), str(refused))
    except PipelineError as error:
        return Summary(path.name, str(path), f"broken: {error}")


def _folders(folder: Path) -> list[Path]:
    return [path for path in entries(folder) if (found := status(path)) and stat.S_ISDIR(found.st_mode)]


def _state(path: Path, manifest: Manifest, here: list[FileEntry]) -> str:
    """Return the state of a set by the sizes of its files: complete, partly pulled, or broken."""
    have, want = len(manifest.shards), manifest.plan.num_shards
    if have != want:
        return f"broken: its manifest has {have} of {want} shards. Run `pipeline extract-features`."
    if problem := next(filter(None, (entry.size_problem(path) for entry in here)), None):
        return f"broken: {problem}"
    if len(here) == want + 1:
        return "complete"
    if manifest.basis not in here:
        return "basis.h5 is missing. `dvc pull` it."
    return f"{len(here) - 1} of {want} shards here. `dvc pull` the others."


def _describe(path: Path, state: str, plan: Plan, size: int) -> Summary:
    content, backbone = plan.content, plan.provenance.get("backbone", {})
    revision = backbone.get("revision")
    return Summary(
        name=path.name,
        path=str(path),
        state=state,
        dataset=plan.provenance.get("dataset"),
        backbone=f"{backbone.get('name')}" + (f"@{revision[:8]}" if revision else ""),
        timestep=content.timestep,
        layers=list(content.layers),
        dims=content.num_dims,
        prompts=content.prompts_per_image,
        rows=plan.rows,
        bytes=size,
        storage=content.storage,
        added_noise=content.added_noise.scale if content.added_noise else None,
        fingerprint=content.fingerprint,
    )
