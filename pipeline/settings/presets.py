"""Merge presets, which are named settings, into params.yaml.

params.yaml stays the only file that DVC reads: a preset is written into it, its comments are kept, and `git diff` shows
what changed. A preset is a YAML file with sections, like params.yaml:

- A key replaces the value of that key; under `methods` and `partitions` an entry replaces the entry of its name.
- `base` names one or more presets to merge first; later ones override earlier ones.
- `experiments` maps keys to lists of values, and the pipeline runs once per combination; or it lists mappings of keys
  to values, and the pipeline runs once for each. Every run is a DVC experiment.

The project's `presets/` override those of the package. Another file is given by its path, which ends in .yaml and is
relative to the working folder or to the project. Edits of params.yaml that neither git nor a preset has are kept.
"""

import difflib
import io
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import project
from pipeline.errors import ConfigError, PipelineError
from pipeline.io import atomic
from pipeline.io.system_errors import entries, status
from pipeline.settings import config
from pipeline.text import printable

_UNKNOWN_TO_GIT = (
    "not a git repository",
    "not in the index",
    "does not exist",
    "neither on disk nor in the index",
    "unknown revision",
)


@dataclass(frozen=True)
class Merge:
    """A preset merged over a parameter file, which is not written yet.

    Attributes:
        text: The new content of the file, which is valid with the values of every experiment.
        changes: Dotted key -> old and new value; the old one is None if the key was absent.
        absent: The keys that were absent.
        experiments: Dotted key -> value; one without keys if the preset asks for none.
        runs: Number of federated runs of all experiments.
    """

    name: str
    params_file: Path
    text: str
    changes: dict[str, tuple[Any, Any]]
    absent: frozenset[str]
    experiments: list[dict[str, Any]]
    runs: int

    def edits_lost(self) -> list[str]:
        """Return the keys that it would overwrite although neither git nor a preset has their values."""
        return _only_here({k: old for k, (old, _) in self.changes.items() if k not in self.absent}, self.params_file)

    def write(self, force: bool = False) -> str | None:
        """Write the file, and return the command that restores the old one; None if nothing changes.

        The file as it was is kept as params.yaml.old (params.yaml.old2 if there is one already), unless git has it.
        `force` overwrites edits that git does not have. Raise ConfigError if it would overwrite any.
        """
        if not force and (edits := self.edits_lost()):
            raise ConfigError(f"{self.refusal(edits)} Commit or `git add` them first, or pass --force.")
        if not self.changes:
            return None
        try:
            kept_by_git = _in_git(self.params_file) == config.read_yaml(self.params_file)
        except ConfigError:  # git refuses the repository
            kept_by_git = False
        old_file = _unused(self.params_file.with_name(f"{self.params_file.name}.old"))
        if not kept_by_git:
            shutil.copyfile(self.params_file, old_file)
        atomic.write_text(self.params_file, self.text)
        return f"git checkout {self.params_file}" if kept_by_git else f"mv {old_file} {self.params_file}"

    def refusal(self, edits: list[str]) -> str:
        """Say which edits it would overwrite."""
        return f"Preset {self.name} would overwrite uncommitted edits in {self.params_file} ({', '.join(edits)})."


def describe(folder: Path) -> dict[str, str]:
    """Return every preset by name, with the comment at the top of its file; `folder` need not exist."""
    return {name: _comment(file.read_text(encoding="utf-8")) for name, file in _files(folder).items()}


def _comment(text: str) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def _files(folder: Path) -> dict[str, Path]:
    """Name -> file, of the package's presets and of those in the project's `folder`, which override them."""
    found = [*entries(project.source() / "presets"), *entries(folder)]
    return dict(sorted({file.stem: file for file in found if file.suffix == ".yaml"}.items()))


def merge(name: str, params_file: Path) -> Merge:
    """Merge a preset, by name or path, over params.yaml, without writing it.

    Raises:
        ConfigError: The preset does not exist, or it or the result is not valid.
    """
    config.load(params_file)  # so that an error that is already in the file is not blamed on the preset
    preset = _read(name, params_file.parent / "presets")
    experiments = _combinations(name, preset.pop("experiments", {}))
    before = config.read_yaml(params_file)
    new = {f"{section}.{key}": value for section, keys in preset.items() for key, value in keys.items()}
    changes = {key: (config.at(before, key), value) for key, value in new.items() if config.at(before, key) != value}
    yaml, stream = _round_trip(), io.StringIO()
    values = yaml.load(params_file.read_text(encoding="utf-8"))
    for dotted_key, (_, value) in changes.items():
        section, _, key = dotted_key.partition(".")
        values.setdefault(section, {})[key] = value
    yaml.dump(values, stream)
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / params_file.name
        merged.write_text(stream.getvalue(), encoding="utf-8")
        try:
            runs = sum(_runs(config.load(merged, changed)) for changed in experiments)
        except PipelineError as error:
            raise ConfigError(str(error).replace(str(merged), f"preset {name}")) from None
    absent = frozenset(key for key, (old, _) in changes.items() if old is ...)
    shown = {key: (None if key in absent else old, value) for key, (old, value) in changes.items()}
    return Merge(name, params_file, stream.getvalue(), shown, absent, experiments, runs)


def _runs(made: config.Config) -> int:
    sweep = made.params.sweep
    return len(sweep.methods) * len(sweep.partitions) * len(sweep.seeds)


def _unused(file: Path) -> Path:
    """Return `file`, or, if it exists, its name with the first number from 2 that is not used."""
    names = itertools.chain([file], (file.with_name(f"{file.name}{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def overrides(experiments: list[dict[str, Any]], params: Any) -> list[list[str]]:
    """Return the words key=value of every experiment, for `dvc exp run --set-param`.

    An experiment leaves its values in params.yaml. Each therefore sets all keys that any of them changes, to its own
    value or to that of `params`, the content of params.yaml before the first.
    """
    keys = dict.fromkeys(key for changes in experiments for key in changes)
    values = [{key: changes.get(key, config.at(params, key)) for key in keys} for changes in experiments]
    return [[f"{key}={_in_hydra(value)}" for key, value in own.items() if value is not ...] for own in values]


def _in_hydra(value: Any) -> str:
    """Write a value in the grammar of Hydra, which DVC uses: mappings have keys without quotes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_in_hydra(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_in_hydra, value)) + "]"
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{quoted}'"
    return json.dumps(value)


def _combinations(name: str, experiments: Any) -> list[dict[str, Any]]:
    """Return the values of keys of every experiment; one experiment without any if the preset asks for none."""
    if isinstance(experiments, list) and experiments and all(isinstance(each, dict) for each in experiments):
        return experiments
    if not isinstance(experiments, dict):
        raise ConfigError(
            f"Preset {name}: experiments must map keys to lists of values, or list mappings of keys to values."
        )
    lists = [values if isinstance(values, list) else [values] for values in experiments.values()]
    return [dict(zip(experiments, values, strict=True)) for values in itertools.product(*lists)]


def _read(name: str, folder: Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a preset and merge it over its bases: section -> keys; `above` are the presets that it is a base of."""
    if name in above:
        raise ConfigError(f"Preset {name} is a base of itself. Remove one of {', '.join(above)} from `base`.")
    own = config.read_yaml(_file(name, folder))
    bases = own.pop("base", [])
    if wrong := [key for key, keys in own.items() if not isinstance(keys, dict) and key != "experiments"]:
        raise ConfigError(f"Preset {name}: {wrong[0]} must be a section with its keys below it.")
    merged: dict[str, Any] = {}
    below = (_read(base, folder, (*above, name)) for base in ([bases] if isinstance(bases, str) else bases))
    for layer in (*below, own):
        for section, keys in layer.items():
            lower = merged.get(section, {})
            merged[section] = lower | keys if isinstance(lower, dict) and isinstance(keys, dict) else keys
    return merged


def _file(name: str, folder: Path) -> Path:
    known = _files(folder)
    if name in known:
        return known[name]
    places = [Path(name).absolute(), folder.parent / name] if name.endswith(".yaml") else []
    if found := next((place for place in places if status(place)), None):
        return found
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    looked = f" (looked for {' and '.join(map(str, dict.fromkeys(places)))})" if places else ""
    hint = f"Did you mean {near[0]}?" if near else f"Available: {', '.join(known)}."
    raise ConfigError(f"Unknown preset {name}{looked}. {hint}")


def _only_here(values: Mapping[str, Any], params_file: Path) -> list[str]:
    """Return the dotted keys whose values neither git nor a preset has; none if git does not track the file."""
    tracked = _in_git(params_file)
    if tracked is None:
        return []
    folder = params_file.parent / "presets"
    holders = [tracked, *(_read(name, folder) for name in _files(folder))]
    return [key for key, value in values.items() if not any(config.at(holder, key) == value for holder in holders)]


def _in_git(file: Path) -> Any:
    """Return the file's values in git's index, from where `git checkout` restores it; None if git does not track it."""
    from ruamel.yaml import YAMLError

    command, environment = ["git", "show", f":./{file.name}"], {**os.environ, "LC_ALL": "C"}
    try:
        answer = subprocess.run(command, cwd=file.parent, env=environment, capture_output=True, check=False)
        reason = answer.stderr.decode(errors="replace").strip() if answer.returncode else ""
    except FileNotFoundError:  # git is not installed
        return None
    except OSError as error:
        reason = error.strerror or str(error)
    if any(words in reason for words in _UNKNOWN_TO_GIT):
        return None
    if reason:
        raise ConfigError(  # for example, because another user owns the repository
            f"{file} may have uncommitted edits, and git cannot tell ({printable(reason.splitlines()[0])}). Make git "
            "work there, or pass --force to overwrite them."
        )
    try:
        return config.parse_yaml(answer.stdout.decode("utf-8"))
    except (UnicodeDecodeError, YAMLError):
        return None


def _round_trip() -> Any:
    """Return a YAML reader and writer that keeps comments and quotes, and the style of null and of [a, b]."""
    from ruamel.yaml import YAML, RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        pass

    tag = "tag:yaml.org,2002:"
    Representer.add_representer(type(None), lambda to, _: to.represent_scalar(f"{tag}null", "null"))
    Representer.add_representer(list, lambda to, values: to.represent_sequence(f"{tag}seq", values, flow_style=True))
    yaml = YAML()
    yaml.Representer = Representer
    yaml.preserve_quotes = True
    yaml.width = 120
    return yaml
