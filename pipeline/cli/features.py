"""`pipeline features`: list, show, verify, compare, export and import cached feature sets."""

import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import FeatureSetError
from pipeline.text import first_few, printable, size

if TYPE_CHECKING:
    from pipeline.feature_store import Manifest
    from pipeline.settings.config import Config

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


@click.group("features")
def features() -> None:
    """Work with cached feature sets: list, show, verify, diff, export, import."""


@features.command("list")
@_JSON
@click.pass_obj
def list_sets(params: Path, as_json: bool) -> None:
    """List the feature sets, finished and unfinished.

    \b
    Example:
      pipeline features list
    """
    from pipeline.feature_store import listing

    config = _config(params)
    sets = _sets(config)
    found = listing.finished(sets) + listing.leftovers(sets) + listing.unfinished(config.state_dir / "staging")
    if as_json:
        click.echo(json.dumps([vars(summary) for summary in found], indent=2))
        return
    if not found:
        click.echo(f"No feature set under {sets}. Run `pipeline extract-features`, or `dvc pull` one.")
    for one in found:
        _print(f"{one.name}: {one.state}")
        if one.fingerprint is None:
            continue
        assert one.layers is not None and one.rows is not None and one.bytes is not None
        noise = f", noise {one.added_noise:g}" if one.added_noise else ""
        _print(
            f"    {one.dataset}, {one.rows:,} images; {one.backbone}, t {one.timestep}, {', '.join(one.layers)}, "
            f"{one.dims} dims, {one.prompts} prompts; {one.storage}{noise}, {size(one.bytes)}, {one.fingerprint[:12]}"
        )


@features.command("show")
@click.argument("name")
@_JSON
@click.pass_obj
def show(params: Path, name: str, as_json: bool) -> None:
    """Describe one set: NAME under data/features, a folder, or an exported tar.

    \b
    Examples:
      pipeline features show digits-tiny-sd-t300
      pipeline features show received.tar
    """
    manifest = _manifest(params, name)
    if as_json:
        click.echo(json.dumps(manifest.model_dump(mode="json"), indent=2))
        return
    for key, text in _card(manifest):
        _print(f"{key:14}{text}")


@features.command("verify")
@click.argument("names", nargs=-1)
@click.option("--full", is_flag=True, help="Read every byte: checksums of files and rows; features must be finite.")
@click.pass_obj
def verify(params: Path, names: tuple[str, ...], full: bool) -> None:
    """Check that sets are complete and undamaged. NAMES are sets under data/features, or folders; default: all sets.

    \b
    Examples:
      pipeline features verify
      pipeline features verify --full digits-tiny-sd-t300
    """
    from pipeline.feature_store import listing, verification
    from pipeline.progress import progress_bar

    paths = [_folder(params, name) for name in names] or listing.folders(_sets(_config(params)))
    if not paths:
        raise FeatureSetError(f"No feature set under {_sets(_config(params))}. `dvc pull` one, or extract it.")
    broken = 0
    for path in paths:
        with progress_bar(verification.total_bytes(path), f"verify {path.name}", "B") as bar:
            found = verification.problems(path, full, bar.update)
        broken += bool(found)
        for problem in found:
            _print(f"Error: {problem}", err=True)
        if not found:
            result = "intact, every byte was checked" if full else "complete (add --full to check every byte)"
            _print(f"{path.name}: {result}")
    if broken:
        raise click.exceptions.Exit(1)


@features.command("diff")
@click.argument("first")
@click.argument("second")
@_JSON
@click.pass_obj
def diff(params: Path, first: str, second: str, as_json: bool) -> None:
    """Show how two sets differ: settings, software and, if both are folders, the numbers.

    \b
    Examples:
      pipeline features diff digits-tiny-sd-t300 digits-tiny-sd-t100
      pipeline features diff digits-tiny-sd-t300 received.tar
    """
    from pipeline.feature_store import comparison

    manifests = [_manifest(params, name) for name in (first, second)]
    settings = comparison.settings(*manifests)
    folders = [_path(params, name) for name in (first, second)]
    why_not = comparison.incomparable(*manifests)
    if not all(path.is_dir() for path in folders):
        why_not = "import the archive first"
    numbers = [] if why_not else comparison.numbers(*folders)
    if as_json:
        parts = {"settings": [vars(one) for one in settings], "numbers": [vars(one) for one in numbers]}
        click.echo(json.dumps(parts | {"numbers_not_compared": why_not}, indent=2))
        return
    same = manifests[0].fingerprint == manifests[1].fingerprint
    click.echo("same features (fingerprints are equal)" if same else "different features (fingerprints differ)")
    for change in settings:
        _print(f"{change.key}: {_short(change.first)} | {_short(change.second)}")
    for gap in numbers:
        _print(
            f"{gap.representation}, {gap.layer}: {100 * gap.share_unequal:.2f} % of the numbers differ, by "
            f"{gap.mean:.3g} on average and {gap.largest:.3g} at most"
        )
    if why_not:
        click.echo(f"numbers not compared: {why_not}")


@features.command("export")
@click.argument("name")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The tar to write; default: NAME.tar or NAME-noiseSCALE.tar, here.",
)
@click.option("--noise", type=float, metavar="SCALE", help="Add Gaussian noise of SCALE standard deviations.")
@click.pass_obj
def export(params: Path, name: str, output: Path | None, noise: float | None) -> None:
    """Pack a set into one tar, for people without DVC. Every byte is checked.

    An earlier export is replaced, but no other file, and no export with noise.

    With --noise, the tar holds a copy whose representations have noise, so that fewer images can be recognised in
    it (docs/security.md). Labels stay as they are. The noise is random and stored nowhere: two exports differ, and
    a person with several tars of one set can average the noise away. Export once, and give everyone the same tar.

    \b
    Examples:
      pipeline features export digits-tiny-sd-t300 -o /tmp/digits.tar
      pipeline features export digits-tiny-sd-t300 --noise 8 -o /tmp/noisy.tar
    """
    from pipeline.feature_store import archive, verification
    from pipeline.progress import progress_bar

    path = _folder(params, name)
    own_name = Path(os.path.abspath(path)).name
    target = output or Path(f"{own_name}.tar" if noise is None else f"{own_name}-noise{noise:g}.tar")
    total = verification.total_bytes(path) * (1 if noise is None else 2)  # with noise: a copy is written, then packed
    with progress_bar(total, f"export {own_name}", "B") as bar:
        archive.write(path, target, bar.update, noise)
    click.echo(target)


@features.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--as", "name", help="Name under data/features; default: the archive's own.")
@click.pass_obj
def import_set(params: Path, file: Path, name: str | None) -> None:
    """Unpack an exported set into data/features, after checking every byte of it, unless the same set is there.

    \b
    Examples:
      pipeline features import received.tar
      pipeline features import received.tar --as digits-tiny-sd-t300
    """
    from pipeline.feature_store import archive
    from pipeline.progress import progress_bar

    config = _config(params)
    with progress_bar(file.stat().st_size if file.exists() else 0, f"import {file.name}", "B") as bar:
        path = archive.read(file, _sets(config), name, bar.update)
    click.echo(path)
    if path != config.features_dir:
        settings = f"`pipeline features show {path.name}` prints the settings of this set"
        click.echo(f"params.yaml trains from {config.features_dir.name}. {settings}.", err=True)
    elif (config.root / "dvc.yaml").exists():
        remedy = "Run `dvc commit -f extract-features` first (docs/sharing.md, From a tar)"
        click.echo(f"DVC does not know this set, and the next `dvc repro` would delete it. {remedy}.", err=True)


def _config(params: Path) -> "Config":
    from pipeline.settings import config

    importlib.import_module("stages.train_fl.methods")  # registers the methods' settings
    return config.load(params)


def _sets(config: "Config") -> Path:
    return config.features_dir.parent


def _path(params: Path, name: str) -> Path:
    """Return the set of that name under data/features if there is one, else the path itself."""
    if "/" not in name and not name.endswith(".tar"):
        known = _sets(_config(params)) / name
        if known.exists() or not Path(name).exists():
            return known
    return Path(name)


def _folder(params: Path, name: str) -> Path:
    path = _path(params, name)
    if not path.is_dir():
        from pipeline.feature_store import listing

        if path.is_file():
            remedy = f"To unpack an exported set, run `pipeline features import {path}`"
            raise FeatureSetError(f"{path} is a file, not a folder. {remedy}.")
        if "/" in name:
            raise FeatureSetError(f"{path} is not a folder. Give the folder of a feature set.")
        there = ", ".join(one.name for one in listing.folders(_sets(_config(params)))) or "none"
        raise FeatureSetError(f"{path} does not exist. Available feature sets: {there}.")
    return path


def _manifest(params: Path, name: str) -> "Manifest":
    from pipeline.feature_store import archive, read_manifest

    path = _path(params, name)
    return archive.manifest_of(path) if path.is_file() else read_manifest(_folder(params, name))


def _print(line: str, err: bool = False) -> None:
    """Print text that may come from a set's author: on one line, without control characters."""
    click.echo(printable(line), err=err)


def _card(manifest: "Manifest") -> list[tuple[str, str]]:
    from pipeline.settings.config import dotted

    content, made = manifest.content, manifest.provenance
    backbone, settings = made.get("backbone", {}), dotted(made["settings"]) if "settings" in made else {}
    weights = f", {backbone['variant']} weights" if "variant" in backbone else ""
    revision = f", revision {backbone['revision']}" if backbone.get("revision") else ""
    model = f"{backbone.get('name')} from {backbone.get('source')}{revision}{weights}"
    texts = _short([text for one in content.prompts for text in one])
    match = "the prompt of the label" if content.positive == "label" else "the first prompt (labels are not used)"
    layers = ", ".join(f"{name} (columns {low} to {high - 1})" for name, (low, high) in content.layers.items())
    shards, total = manifest.plan.num_shards, size(sum(entry.bytes for entry in manifest.files))
    packages = ", ".join(f"{name} {version}" for name, version in made.get("packages", {}).items())
    fitted = min(content.basis_images or 0, manifest.rows)
    basis = f"PCA fitted on {fitted} images" if fitted else f"given, {content.basis_sha256}"
    return [
        ("fingerprint", manifest.fingerprint),
        ("data set", f"{made.get('dataset')}, {manifest.rows:,} training images, hash {content.dataset_hash[:12]}"),
        ("classes", _short(content.class_names)),
        ("backbone", model),
        (
            "computed",
            f"at timestep {content.timestep}, {content.image_size} px, in {content.dtype}; stored as {content.storage}",
        ),
        *([("noise", f"{content.added_noise}, added to every number by an export")] if content.added_noise else []),
        ("layers", layers),
        ("basis", basis),
        ("prompts", f"{manifest.prompts_per_image} per image, of {texts}"),
        ("matching", match),
        ("denoising", f"with the prompt {content.denoise_prompt!r}"),
        ("files", f"{shards} shards of at most {manifest.rows_per_shard} images, {total} in total"),
        *([("settings", ", ".join(f"{key}: {_yaml(value)}" for key, value in settings.items()))] if settings else []),
        ("made by", f"feddifrc {made.get('feddifrc')}, commit {made.get('commit')}"),
        ("on", f"{', '.join(made.get('hardware', []))}; {packages}"),
    ]


def _short(value: Any) -> str:
    return first_few([str(one) for one in value]) if isinstance(value, list) else _yaml(value)


def _yaml(value: Any) -> str:
    """Return a value as params.yaml has it."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
