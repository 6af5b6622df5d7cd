"""The configuration: params.yaml, read and checked, and the layout of the project's files.

An unknown key, a missing one, a wrong type or a value out of range is one line that names file, key, value and what
is allowed. The file is read as YAML 1.2, as DVC reads it (PyYAML's 1.1 would make `1e-4` a string).
"""

import itertools
import json
import os
import re
import shlex
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from pipeline.errors import ConfigError, PipelineError
from pipeline.settings.error_messages import explain, models_of
from pipeline.settings.params import METHODS, Params, Section
from pipeline.text import printable

_MAX_OPEN_BRACKETS = 100
_YAML_KINDS = {
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "null": "an empty value",
    "timestamp": "a date",
}


class Config:
    """Checked parameters and the layout of the project's files, relative to the folder of params.yaml."""

    def __init__(self, params: Params, root: Path, sweep_is_as_written: bool = True) -> None:
        """Holds `params` for a project with its files under `root`; the sweep is params.yaml's, or another for once."""
        self.params = params
        self.root = root
        self.sweep_is_as_written = sweep_is_as_written

    @property
    def home(self) -> Path:
        """The folder of files that DVC does not track: the real project, also in an experiment's temporary copy."""
        project = Path(os.environ.get("DVC_ROOT", self.root)).resolve()  # DVC gives every stage the real project's root
        if not self.root.is_relative_to(project / ".dvc" / "tmp"):
            return self.root
        copy = next(folder for folder in (self.root, *self.root.parents) if (folder / ".dvc").is_dir())
        return project / self.root.relative_to(copy)

    def places(self, written: str) -> list[Path]:
        """Where a path of params.yaml is looked for, in this order: the one rule for every key that names a path.

        "~" is the user's home and $NAME an environment variable. A relative path starts at the folder of params.yaml.
        The temporary copy that DVC makes of a project for an experiment has only the files that git or DVC track: what
        it lacks is taken from the project.
        """
        path = os.path.expanduser(os.path.expandvars(written))
        return list(dict.fromkeys([self.root / path, self.home / path]))

    def path(self, written: str) -> Path:
        """The file or folder that a path of params.yaml means: the first that exists of `places`, or the last."""
        places = self.places(written)
        return next((place for place in places if os.path.exists(place)), places[-1])

    @property
    def dataset_dir(self) -> Path:
        """The prepared data set."""
        return self.root / "data" / "datasets" / self.params.prepare_data.name

    @property
    def backbone_dir(self) -> Path:
        """The frozen model's weights, which neither git nor DVC tracks."""
        return self.home / "models" / self.params.prepare_backbone.name

    @property
    def backbone_manifest(self) -> Path:
        """What the frozen model is: the file that DVC tracks in place of the weights."""
        return self.root / "data" / "backbones" / f"{self.params.prepare_backbone.name}.json"

    @property
    def features_dir(self) -> Path:
        """The cached feature set: one folder per data set, backbone and timestep."""
        p = self.params
        set_name = f"{p.prepare_data.name}-{p.prepare_backbone.name}-t{p.extract_features.timestep}"
        return self.root / "data" / "features" / set_name

    @property
    def synthetic_dir(self) -> Path:
        """The images that the frozen model generated of the data set's classes."""
        return self.root / "data" / "datasets" / f"{self.params.prepare_data.name}-synthetic"

    @property
    def synthetic_names(self) -> list[Path]:
        """A file for each rule of balancing, with the hash of the generated images: what DVC's training depends on.

        Its name is the value of `train_fl.balance_with_synthetic`. For "none" git has one, which never changes, so
        that training without generated images does not wait for any.
        """
        return [self.root / "data" / "synthetic" / rule for rule in ("mean", "largest")]

    @property
    def state_dir(self) -> Path:
        """What unfinished work left for resuming: outside every DVC out, because DVC deletes those before a stage."""
        return self.home / ".pipeline"

    @property
    def results_dir(self) -> Path:
        """One folder a run."""
        return self.root / "results"

    def run_dir(self, method: str, partition: str, seed: int) -> Path:
        """The folder of one run of the sweep."""
        return self.results_dir / f"{method}-{partition}-s{seed}"

    @property
    def runs_of_sweep(self) -> list[Path]:
        """The folders of the runs that the sweep names."""
        sweep = self.params.sweep
        return [self.run_dir(*run) for run in itertools.product(sweep.methods, sweep.partitions, sweep.seeds)]

    @property
    def sweep_dir(self) -> Path:
        """A small file for each finished run of the sweep, see `pipeline.run_digests`."""
        return self.results_dir / ".sweep"

    def settings(self, section: Literal["methods", "partitions"], name: str) -> Section:
        """The settings of a named method or partition.

        Raises:
            PipelineError: there is no such name; the message lists those there are.
        """
        known: Mapping[str, Section] = getattr(self.params, section)
        if name not in known:
            raise PipelineError(f"params.yaml has no {section}.{name}; it has {', '.join(known)}")
        return known[name]

    def settings_of_run(self, method: str, partition: str) -> dict[str, Any]:
        """The settings that decide a run, as its config.json holds them.

        Raises:
            PipelineError: there is no such method or partition.
        """
        return {
            "method": {"name": method, **self.settings("methods", method).model_dump()},
            "partition": {"name": partition, **self.settings("partitions", partition).model_dump()},
            "train_fl": self.params.train_fl.model_dump(),
            "dataset": {"name": self.params.prepare_data.name},
        }

    def check_settings_of_run(self, folder: Path, found: Mapping[str, Any], method: str, partition: str) -> None:
        """Checks that a run, by its config.json, was made with the present settings.

        Raises:
            PipelineError: it was not; names what differs, both values, and the flags that take the run as it is.
        """
        wanted = self.settings_of_run(method, partition)
        if not (differing := differing_keys(found, wanted)):
            return
        sections = {"method": f"methods.{method}", "partition": f"partitions.{partition}", "dataset": "prepare_data"}
        said, flags = [], []
        for setting in differing:
            section, _, inner = setting.partition(".")
            key = ".".join(part for part in (sections.get(section, section), inner) if part)
            theirs, here = at(found, setting), at(wanted, setting)
            said.append(f"{key} {_as_typed(theirs)}, where params.yaml has {_as_typed(here)}")
            if inner and theirs is not ...:
                flags.append(f"--set {shlex.quote(f'{key}={_as_typed(theirs)}')}")
        taken = f", or take it as it is, with {' '.join(flags)}" if len(flags) == len(differing) else ""
        raise PipelineError(f"{folder} was made with {'; '.join(said)}: train it again, as by `dvc repro`{taken}")


def _as_typed(value: Any) -> str:
    """A value as `--set` takes it; "nothing" for ..."""
    if value is ...:
        return "nothing"
    return printable(value if isinstance(value, str) else json.dumps(value))


def at(values: Any, dotted_key: str, missing: Any = ...) -> Any:
    """The value at a dotted key of nested mappings, or `missing` if there is none."""
    for part in dotted_key.split("."):
        values = values.get(part, missing) if isinstance(values, Mapping) else missing
    return values


def dotted(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists and empty mappings stay whole."""
    if not isinstance(values, Mapping) or not values:
        return {prefix: values}
    parts = [dotted(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in values.items()]
    return {key: inner for part in parts for key, inner in part.items()}


def differing_keys(found: Any, wanted: Mapping[str, Any]) -> list[str]:
    """The dotted keys of `wanted` that are missing or another in `found`, read from JSON; others there do not count."""
    differing = []
    for key, value in wanted.items():
        present = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(value, Mapping) and isinstance(present, Mapping):
            differing += [f"{key}.{inner}" for inner in differing_keys(present, value)]
        elif present != value:
            differing.append(key)
    return differing


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads and checks params.yaml.

    Args:
        path: the file.
        overrides: dotted key -> value, put over the file's values for this run ("train_fl.num_rounds": 3).

    Raises:
        PipelineError: the file is missing or not YAML, a key is unknown, missing, of a wrong type or range, or the
            sweep names what there is not.
    """
    if not METHODS:
        raise ConfigError("No federated methods are registered. Import stages.train_fl.methods before config.load.")
    values, overrides = read_yaml(path), overrides or {}
    for key, value in overrides.items():
        _set(values, key, value)

    def where(key: str) -> str:
        typed = any(f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.") for other in overrides)
        return "command line" if typed else str(path)

    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        raise PipelineError(explain(error, values, where)) from None
    _check_sweep(params, where)
    _check_names_of_runs(params, where)
    sweep_is_as_written = not any(key.partition(".")[0] == "sweep" for key in overrides)
    return Config(params, path.resolve().parent, sweep_is_as_written)


def parse_value(key: str, text: str) -> Any:
    """A value typed on the command line for a dotted key.

    Where the key takes text, the text is the value as it is typed ("007" is a name), and null is none; elsewhere it is
    read as it would be in params.yaml.
    """
    from ruamel.yaml import YAMLError

    fields = _fields(key)
    if text in ("null", "~") and any(_accepts(field, None) for field in fields):
        return None
    if any(_accepts(field, text) for field in fields):
        return text
    try:
        value = parse_yaml(text)
    except YAMLError:
        return text
    return text if value is None and text not in ("null", "~") else value


def _fields(dotted_key: str) -> list[FieldInfo]:
    """What is declared for a key: nothing if it is unknown, several where methods share its name."""
    section, _, rest = dotted_key.partition(".")
    name = rest.rpartition(".")[2]
    return [model.model_fields[name] for model in models_of(section) if name in model.model_fields]


def _accepts(field: FieldInfo, value: Any) -> bool:
    annotation: Any = Annotated[field.annotation, field]
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds sections.

    Raises:
        PipelineError: it is missing, cannot be read, is not YAML, or holds something else.
    """
    from ruamel.yaml import YAMLError
    from ruamel.yaml.error import MarkedYAMLError

    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing: run in the project's folder, or name the file by --params") from None
    except UnicodeDecodeError as error:
        raise PipelineError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise PipelineError(f"{path} cannot be read: {error.strerror}") from None
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or error.context or "it cannot be parsed"
        raise PipelineError(f"{path}{line} is not YAML: {' '.join(problem.split())}") from None
    except YAMLError as error:
        raise PipelineError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise PipelineError(f"{path} must hold sections (prepare_data, ...), it holds {found}")
    return values


def parse_yaml(text: str) -> Any:
    """YAML 1.2, no tags that make objects.

    Raises:
        YAMLError: it is not YAML, nested too deeply, gives two places one anchor, or holds a date or number that is
            none: of these the library's parser raises whatever comes.
    """
    from ruamel.yaml import YAML, YAMLError
    from ruamel.yaml.error import ReusedAnchorWarning

    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):  # the parser's time grows with the square of those that are open
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        deepest = max(deepest, depth)
    if deepest > _MAX_OPEN_BRACKETS:
        raise YAMLError("it is nested too deeply")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ReusedAnchorWarning)
            return YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise
    except ReusedAnchorWarning as warning:
        raise YAMLError(str(warning).strip().splitlines()[0]) from None
    except RecursionError:
        raise YAMLError("it is nested too deeply") from None
    except Exception as error:
        raise YAMLError(f"a value cannot be read ({error or type(error).__name__})") from None


def keys_that_are_no_text(text: str) -> list[tuple[int, str, str]]:
    """Keys of a YAML file's outermost mapping that are not text to YAML: 007, true, null.

    Args:
        text: the file's text, which `parse_yaml` has read.

    Returns:
        Per key its line, counted from 1, the key as it is written, and what YAML takes it for.
    """
    from ruamel.yaml import YAML

    document = YAML(typ="safe", pure=True).compose(text)
    keys = [key for key, _ in document.value] if getattr(document, "id", "") == "mapping" else []
    found = [(key.start_mark.line + 1, key.value, str(key.tag).rpartition(":")[2]) for key in keys]
    return [(line, str(written), _YAML_KINDS.get(kind, kind)) for line, written, kind in found if kind in _YAML_KINDS]


def _set(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    *parents, key = dotted_key.split(".")
    for parent in parents:
        section = values.get(parent, {})
        if not isinstance(section, dict):
            raise PipelineError(f"cannot set {dotted_key}: {parent} is a value, not a section")
        values[parent] = dict(section)  # with a YAML alias, others share it
        values = values[parent]
    values[key] = value


def _check_sweep(params: Params, where: Callable[[str], str]) -> None:
    """Every method and partition that the sweep names has its settings."""
    for section, names, known in (
        ("methods", params.sweep.methods, params.methods),
        ("partitions", params.sweep.partitions, params.partitions),
    ):
        for name in names:
            if name not in known:
                key = f"sweep.{section}"
                raise PipelineError(
                    f"{where(key)}: {key} names {name}, which is not under {section}: {', '.join(known)}"
                )


def _check_names_of_runs(params: Params, where: Callable[[str], str]) -> None:
    """Every method has a run's folder of its own on every partition: with hyphens in both names two may meet."""
    owners: dict[str, tuple[str, str]] = {}
    for pair in itertools.product(params.methods, params.partitions):
        method, partition = owners.setdefault("-".join(pair), pair)
        if (method, partition) != pair:
            raise PipelineError(
                f"{where('partitions')}: partitions: method {method} on partition {partition} and method {pair[0]} on "
                f"partition {pair[1]} would both be results/{'-'.join(pair)}-s0: rename one of them"
            )
