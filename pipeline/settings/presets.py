"""Presets: named settings, as `presets/<name>.yaml`, that are merged into params.yaml.

params.yaml stays the one source of truth that DVC reads; a preset is written into it, comments kept, and `git diff`
shows what it changed. A key replaces its value; under `methods` and `partitions` an entry replaces the entry of its
name, whole. `base: NAME`, or a list of names, takes those presets first, later ones over earlier ones. `experiments`
is not merged: it lists values of keys by which the whole pipeline is run several times, each as a DVC experiment.
A merge stops before it loses a value that neither git nor a preset holds, unless it is told to. A preset in another
folder is given by its path, which ends in .yaml and starts in the working folder or in the project's.
"""

import difflib
import itertools
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.io import atomic
from pipeline.io.system_errors import entries, status
from pipeline.settings import config
from pipeline.text import printable

_UNKNOWN_TO_GIT = ("not a git repository", "not in the index", "does not exist", "neither on disk nor in the index")

_ELSEWHERE = "run in the project's folder, or say `pipeline --params FILE preset` with its parameter file"


@dataclass(frozen=True)
class Applied:
    """What a merge did: dotted key -> (old value, new value), None for none; and the experiments asked for.

    Each experiment is dotted key -> value; a single empty one if the preset asks for none.
    """

    changes: dict[str, tuple[Any, Any]]
    experiments: list[dict[str, Any]]


def describe(folder: Path) -> dict[str, str]:
    """Every preset in `folder` by name, with the first line of its file, which says what it is.

    Raises:
        PipelineError: there are none.
    """
    if not (files := _files(folder)):
        raise PipelineError(f"{folder} has no presets: {_ELSEWHERE}")
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip() for file in files}


def _files(folder: Path) -> list[Path]:
    return [file for file in entries(folder) if file.match("*.yaml")]


def apply(name: str, params_file: Path, force: bool = False) -> Applied:
    """Merges a preset of the project into its params.yaml, or, if the result would not be valid, changes nothing.

    Args:
        name: of a file in presets/ beside `params_file`, or the path of another one, which ends in .yaml.
        params_file: the project's params.yaml.
        force: also replace values that were edited by hand and are kept nowhere else.

    Raises:
        PipelineError: there is no such preset, it is not YAML, or it does not fit the configuration; or it would
            replace values that neither git nor a preset holds.
    """
    merged = _read(name, params_file.parent / "presets")
    experiments = merged.pop("experiments", {})
    config.load(params_file)  # mistakes that are there already are named first
    yaml = _round_trip()
    values = yaml.load(params_file.read_text(encoding="utf-8"))
    before = config.read_yaml(params_file)
    if not force and (lost := _held_nowhere(before, merged, params_file)):
        raise PipelineError(
            f"{params_file} has edits that git does not hold and preset {name} would replace ({', '.join(lost)}): "
            f"`git add {params_file.name}` or commit them first, or say --force"
        )
    for section, keys in merged.items():
        present = values.setdefault(section, {})
        present.update({key: _in_flow(value) for key, value in keys.items() if present.get(key, ...) != value})
    combinations = [dict(zip(experiments, chosen, strict=True)) for chosen in itertools.product(*experiments.values())]
    with atomic.replace_file(params_file) as temporary:
        with temporary.open("w", encoding="utf-8") as stream:
            yaml.dump(values, stream)
        try:
            for changes in combinations:
                config.load(temporary, changes)
        except PipelineError as error:
            raise PipelineError(str(error).replace(str(temporary), f"preset {name}")) from None
    changed = {
        f"{section}.{key}": (before.get(section, {}).get(key), value)
        for section, keys in merged.items()
        for key, value in keys.items()
        if before.get(section, {}).get(key) != value
    }
    return Applied(changed, combinations)


def _read(name: str, folder: Path) -> dict[str, Any]:
    """A preset with its bases under it: section -> keys."""
    own = config.read_yaml(_file(name, folder))
    bases = own.pop("base", [])
    below: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        below = _over(below, _read(base, folder))
    return _over(below, own)


def _file(name: str, folder: Path) -> Path:
    """The file of a preset: `name` in `folder`, or the path `name` from the working folder or the project's."""
    by_path = name.endswith(".yaml")
    places = dict.fromkeys([Path(name).absolute(), folder.parent / name] if by_path else [folder / f"{name}.yaml"])
    if found := next((place for place in places if status(place)), None):
        return found
    known = [file.stem for file in _files(folder)]
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"{folder} has {', '.join(known) or f'no presets: {_ELSEWHERE}'}"
    raise PipelineError(f"no preset {name} (looked for {' and '.join(map(str, places))}); {hint}")


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    return {**below, **{section: {**below.get(section, {}), **keys} for section, keys in above.items()}}


def _held_nowhere(before: Mapping[str, Any], merged: Mapping[str, Any], params_file: Path) -> list[str]:
    """The keys that a merge changes and whose values stand neither in git nor in a preset; none outside of git."""
    committed = _in_git(params_file)
    if committed is None:
        return []
    folder = params_file.parent / "presets"
    holders = [committed, *(_read(file.stem, folder) for file in _files(folder))]
    return [
        f"{section}.{key}"
        for section, keys in merged.items()
        for key in keys
        if before.get(section, {}).get(key, keys[key]) != keys[key]
        and not any(holder.get(section, {}).get(key, ...) == before[section][key] for holder in holders)
    ]


def _in_git(file: Path) -> dict[str, Any] | None:
    """The file as git's index has it, where `git checkout` takes it from; None if git does not know it.

    Raises:
        PipelineError: git does not say, for example because the repository is another user's.
    """
    from ruamel.yaml import YAMLError

    command, environment = ["git", "show", f":./{file.name}"], {**os.environ, "LC_ALL": "C"}
    try:
        answer = subprocess.run(command, cwd=file.parent, env=environment, capture_output=True, check=False)
        reason = answer.stderr.decode(errors="replace").strip() if answer.returncode else ""
    except FileNotFoundError:  # there is no git
        return None
    except OSError as error:
        reason = error.strerror or str(error)
    if any(words in reason for words in _UNKNOWN_TO_GIT):
        return None
    if reason:
        raise PipelineError(
            f"{file} may have edits that would be lost, and git cannot tell ({printable(reason.splitlines()[0])}). "
            "Make git work there, or say --force to replace them."
        )
    try:
        values = config.parse_yaml(answer.stdout.decode("utf-8"))
    except (UnicodeDecodeError, YAMLError):
        return None
    return {s: keys for s, keys in values.items() if isinstance(keys, dict)} if isinstance(values, dict) else None


def _round_trip() -> Any:
    """A YAML reader and writer that keeps comments, quotes and the word null."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 120
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def _in_flow(value: Any) -> Any:
    """Lists as [a, b], as params.yaml has them."""
    from ruamel.yaml.comments import CommentedSeq

    if isinstance(value, dict):
        return {key: _in_flow(inner) for key, inner in value.items()}
    if not isinstance(value, list):
        return value
    sequence = CommentedSeq(value)
    sequence.fa.set_flow_style()
    return sequence
