"""What feature sets a project has: finished ones, those in the making, and broken ones among them."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import PipelineError
from pipeline.feature_store.reader import FeatureSet, read_manifest
from pipeline.feature_store.schema import Content, Plan
from pipeline.feature_store.writer import DELIVERED, PLAN, FeatureSetWriter


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


def finished(sets: Path) -> list[Summary]:
    """The sets in the folder `sets`, by name."""
    folders = sorted(path for path in sets.glob("*") if path.is_dir() and path.suffix not in (".tmp", ".old"))
    return [_summarise(path) for path in folders]


def in_the_making(staging: Path) -> list[Summary]:
    """Unfinished extractions, which the same command continues."""
    found = []
    for path in sorted(staging.glob("*/")):
        if (path / DELIVERED).exists():
            continue
        try:
            values = json.loads((path / PLAN).read_text(encoding="utf-8"))
            plan = Plan(**values | {"content": Content.model_validate(values["content"])})
            writer = FeatureSetWriter(path, plan, "")
        except (OSError, ValueError, TypeError, KeyError, ValidationError):
            continue  # another program's, or of an earlier version: extraction does not read it either
        done = plan.num_shards - len(writer.missing_shards)
        size = sum(file.stat().st_size for file in path.glob("*.h5"))
        state = f"{done} of {plan.num_shards} shards: run `pipeline extract-features` with the same settings"
        found.append(_describe(path.name, path, state, plan, size))
    return found


def _summarise(path: Path) -> Summary:
    try:
        manifest = read_manifest(path)
    except PipelineError as error:
        return Summary(path.name, str(path), f"broken: {error}")
    try:
        FeatureSet(path)
        state = "complete"
    except PipelineError as error:
        here = [entry for entry in manifest.shards.values() if not entry.size_difference(path)]
        partly = f"{len(here)} of {manifest.num_shards} shards here: `dvc pull` the others"
        missing_only = all(
            not (path / entry.file).exists() or entry in here for entry in manifest.shards.values()
        ) and not manifest.basis.size_difference(path)
        state = partly if missing_only else f"broken: {error}"
    size = sum((path / e.file).stat().st_size for e in manifest.files if (path / e.file).exists())
    return _describe(path.name, path, state, manifest.plan, size)


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
