"""Read and check params.yaml, and name the project's files.

The file is read as YAML 1.2, as DVC reads it; by the 1.1 rules of PyYAML, `1e-4` would be text.
"""

import copy
import functools
import itertools
import json
import os
import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from pipeline.errors import ConfigError
from pipeline.io.system_errors import reading
from pipeline.settings.error_messages import explain, inner_sections, models_of
from pipeline.settings.params import METHODS, Params, Section
from pipeline.text import printable

NO_CORPUS = "data/corpus/none"
"""prepare_backbone.corpus of a project that trains no guide: a file that is in git."""

_NUMBERS = dict.fromkeys(("int", "float"), "a number")
_YAML_KINDS = _NUMBERS | {"bool": "true or false", "null": "an empty value", "timestamp": "a date"}


@dataclass(frozen=True)
class Config:
    """Checked parameters, and the paths of the project's files.

    Attributes:
        params: The content of params.yaml.
        root: The project's folder, which holds params.yaml.
        sweep_is_as_written: False if the sweep was overridden for one command.
    """

    params: Params
    root: Path
    sweep_is_as_written: bool = True

    @property
    def home(self) -> Path:
        """The project's folder, even if `root` is a temporary copy of it that DVC made for an experiment."""
        project = Path(os.environ.get("DVC_ROOT", self.root)).resolve()  # DVC sets it for every stage
        if not self.root.is_relative_to(project / ".dvc" / "tmp"):
            return self.root
        copy = next(folder for folder in (self.root, *self.root.parents) if (folder / ".dvc").is_dir())
        return project / self.root.relative_to(copy)

    def places(self, written: str) -> list[Path]:
        """Return the candidates for a path in params.yaml, best first.

        "~" is the user's home and $NAME an environment variable; a relative path starts at the folder of params.yaml.
        DVC's temporary copy of a project has only tracked files; others are found in the project.
        """
        path = os.path.expanduser(os.path.expandvars(written))
        return list(dict.fromkeys([self.root / path, self.home / path]))

    def path(self, written: str) -> Path:
        """Return the first of `places` that exists, or the last."""
        places = self.places(written)
        return next((place for place in places if os.path.exists(place)), places[-1])

    @property
    def dataset_dir(self) -> Path:
        """The prepared data set."""
        return self.root / "data" / "datasets" / self.params.prepare_data.name

    @property
    def corpus(self) -> Path | None:
        """The folder of images that a guide is trained on; None if prepare_backbone.corpus names none.

        DVC's prepare-backbone depends on it; data/corpus/none is in git, so without a corpus there is nothing to watch.
        """
        written = self.params.prepare_backbone.corpus
        return None if written is None or written == NO_CORPUS else self.path(written)

    @property
    def backbone_dir(self) -> Path:
        """The frozen model's weights, which neither git nor DVC tracks."""
        return self.home / "models" / self.params.prepare_backbone.name

    @property
    def backbone_manifest(self) -> Path:
        """The description of the frozen model, which DVC tracks instead of the weights."""
        return self.root / "data" / "backbones" / f"{self.params.prepare_backbone.name}.json"

    @property
    def features_dir(self) -> Path:
        """The cached feature set; one folder per data set, backbone and timestep."""
        p = self.params
        set_name = f"{p.prepare_data.name}-{p.prepare_backbone.name}-t{p.extract_features.timestep}"
        return self.root / "data" / "features" / set_name

    @property
    def synthetic_dir(self) -> Path:
        """The images of the data set's classes that the frozen model generated."""
        return self.root / "data" / "datasets" / f"{self.params.prepare_data.name}-synthetic"

    @property
    def synthetic_names(self) -> list[Path]:
        """The files with the hash of the generated images, one per value of `train_fl.balance_with_synthetic`.

        DVC's training depends on the file for the configured value; the one for "none" is in git and never changes.
        """
        return [self.root / "data" / "synthetic" / rule for rule in ("mean", "largest")]

    @property
    def state_dir(self) -> Path:
        """The state of unfinished work, outside DVC's outputs, which DVC deletes before it runs a stage."""
        return self.home / ".pipeline"

    @property
    def results_dir(self) -> Path:
        """The results, one folder per method and partition."""
        return self.root / "results"

    def run_dir(self, method: str, partition: str, seed: int) -> Path:
        """Return the folder of one run; `pipeline.manifests.run_name` is its name."""
        return self.results_dir / f"{method}-{partition}" / f"s{seed}"

    def means_file(self, method: str, partition: str) -> Path:
        """Return the file with the means over the sweep's seeds, which DVC shows as metrics."""
        return self.results_dir / f"{method}-{partition}.json"

    @property
    def runs_of_sweep(self) -> list[Path]:
        """The folders of the sweep's runs."""
        sweep = self.params.sweep
        return [self.run_dir(*run) for run in itertools.product(sweep.methods, sweep.partitions, sweep.seeds)]

    @property
    def sweep_dir(self) -> Path:
        """Digests of the finished runs of the sweep, see `pipeline.run_digests`."""
        return self.results_dir / ".sweep"

    def settings(self, section: Literal["methods", "partitions"], name: str) -> Section:
        """Return the settings of a named method or partition.

        Raises:
            ConfigError: The name is unknown; the message lists those that exist.
        """
        known: Mapping[str, Section] = getattr(self.params, section)
        if name not in known:
            raise ConfigError(f"params.yaml has no {section}.{name}. Available: {', '.join(known)}.")
        return known[name]

    def settings_of_run(self, method: str, partition: str) -> dict[str, Any]:
        """Return the settings that determine a run, as its config.json holds them; raise as `settings` does."""
        return {
            "method": {"name": method, **self.settings("methods", method).model_dump()},
            "partition": {"name": partition, **self.settings("partitions", partition).model_dump()},
            # Whether a run may be guided by a model that saw its images decides nothing about its results.
            "train_fl": self.params.train_fl.model_dump(exclude={"allow_seen_images"}),
            "dataset": {"name": self.params.prepare_data.name},
        }

    def check_settings_of_run(self, folder: Path, found: Mapping[str, Any], method: str, partition: str) -> None:
        """Check the run in `folder`, whose config.json holds `found`, against the present settings.

        Raises:
            ConfigError: A setting differs; the message gives both values, and the flags to report the run unchanged.
        """
        wanted = self.settings_of_run(method, partition)
        if not (differing := differing_keys(found, wanted)):
            return
        sections = {"method": f"methods.{method}", "partition": f"partitions.{partition}", "dataset": "prepare_data"}
        differences, flags = [], []
        for setting in differing:
            section, _, inner = setting.partition(".")
            key = ".".join(part for part in (sections.get(section, section), inner) if part)
            theirs, here = at(found, setting), at(wanted, setting)
            differences.append(f"{key} {_as_typed(theirs)}, but params.yaml has {_as_typed(here)}")
            if inner and theirs is not ...:
                flags.append(f"--set {shlex.quote(f'{key}={_as_typed(theirs)}')}")
        as_is = f", or report it unchanged with {' '.join(flags)}" if len(flags) == len(differing) else ""
        raise ConfigError(
            f"{folder} was trained with {'; '.join(differences)}. Retrain it (for example with `dvc repro`){as_is}."
        )


def _as_typed(value: Any) -> str:
    """Write a value as for `--set`; "nothing" for ..."""
    return "nothing" if value is ... else printable(value if isinstance(value, str) else json.dumps(value))


def at(values: Any, dotted_key: str, missing: Any = ...) -> Any:
    """Return the value at a dotted key of nested mappings, or `missing`."""
    for part in dotted_key.split("."):
        values = values.get(part, missing) if isinstance(values, Mapping) else missing
    return values


def dotted(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys; lists and empty mappings are kept as values."""
    if not isinstance(values, Mapping) or not values:
        return {prefix: values}
    parts = [dotted(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in values.items()]
    return {key: inner for part in parts for key, inner in part.items()}


def differing_keys(found: Any, wanted: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of `wanted` that are missing or differ in `found`, which was read from JSON."""
    differing = []
    for key, value in wanted.items():
        present = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(value, Mapping) and isinstance(present, Mapping):
            differing += [f"{key}.{inner}" for inner in differing_keys(present, value)]
        elif present != value:
            differing.append(key)
    return differing


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read and check params.yaml.

    Args:
        path: The file.
        overrides: Dotted key -> value, replacing the file's values for this run ("train_fl.num_rounds": 3).

    Raises:
        ConfigError: The file is missing or not YAML; a key is unknown, missing, or has a value of the wrong type or
            range; or the sweep names something unknown. One line per mistake, with key, value and what is allowed.
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
        raise ConfigError(explain(error, values, where)) from None
    _check_sweep(params, where)
    _check_names_of_runs(params, where)
    return Config(params, path.resolve().parent, not any(key.partition(".")[0] == "sweep" for key in overrides))


def parse_value(key: str, text: str) -> Any:
    """Parse a value from the command line: as typed if the key accepts text ("007" is a name), else as YAML."""
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


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse KEY=VALUE assignments, with dotted keys, into overrides for `load`; raise ConfigError for another form."""
    overrides = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not (key and equals):
            raise ConfigError(f"{assignment!r} is not an assignment. Write KEY=VALUE.")
        overrides[key] = parse_value(key, text)
    return overrides


def _fields(dotted_key: str) -> list[FieldInfo]:
    """Return the declarations of a key: none if it is unknown, several if methods share its name."""
    section, _, rest = dotted_key.partition(".")
    name = rest.rpartition(".")[2]
    models = models_of(section)
    inner = [found for model in models for sections in inner_sections(model).values() for found in sections]
    return [model.model_fields[name] for model in [*models, *inner] if name in model.model_fields]


def _accepts(field: FieldInfo, value: Any) -> bool:
    try:
        _adapter(field).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@functools.cache  # making one takes a hundred times as long as using it, and each message of a federation needs several
def _adapter(field: FieldInfo) -> TypeAdapter[Any]:
    annotation: Any = Annotated[field.annotation, field]
    return TypeAdapter(annotation)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of sections; raise ConfigError if it is missing, is not YAML, or holds something else."""
    from ruamel.yaml import YAMLError
    from ruamel.yaml.error import MarkedYAMLError

    try:
        with reading(path):
            values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist. Run in the project's folder, name the file with --params, or make a project with "
            "`pipeline init`."
        ) from None
    except UnicodeDecodeError as error:
        detail = f"{error.reason} at byte {error.start}"
        raise ConfigError(f"{path} is not UTF-8 text ({detail}). Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Name a file with --params.") from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = error.problem or error.context or "it cannot be parsed"
        raise ConfigError(f"{path} is not valid YAML ({line}{' '.join(problem.split())}). Fix the line.") from None
    except YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML ({' '.join(str(error).split())}). Fix it.") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path} must hold sections (prepare_data, ...), but holds {found}.")
    return values


def parse_yaml(text: str) -> Any:
    """Parse YAML 1.2, without tags that make objects.

    Raises:
        YAMLError: It is not valid, is nested too deeply, defines an anchor twice, or has an impossible date or number.
    """
    from ruamel.yaml import YAMLError
    from ruamel.yaml.error import ReusedAnchorWarning

    try:
        return copy.deepcopy(_parsed(text))
    except YAMLError:
        raise
    except ReusedAnchorWarning as warning:
        raise YAMLError(str(warning).strip().splitlines()[0]) from None
    except RecursionError:
        raise YAMLError("it is nested too deeply") from None
    except Exception as error:  # impossible dates and numbers raise many types
        raise YAMLError(f"a value cannot be read ({error or type(error).__name__})") from None


@functools.lru_cache(64)
def _parsed(text: str) -> Any:
    """Parse a text once: a node of a federation reads the same settings for every message."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import ReusedAnchorWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", ReusedAnchorWarning)
        return YAML(typ="safe", pure=True).load(text)


def non_text_keys(text: str) -> list[tuple[int, str, str]]:
    """Find the outermost keys of valid YAML that are not text (007, true): line from 1, key as written, and kind."""
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
            raise ConfigError(f"Cannot set {dotted_key} ({parent} is a value, not a section). Check the key.")
        values[parent] = dict(section)  # a YAML alias may share the section with others
        values = values[parent]
    values[key] = value


def _check_sweep(params: Params, where: Callable[[str], str]) -> None:
    """Check that every method and partition of the sweep has settings."""
    for section in ("methods", "partitions"):
        known, key = getattr(params, section), f"sweep.{section}"
        if unknown := [name for name in getattr(params.sweep, section) if name not in known]:
            available = ", ".join(known)
            problem = f"{key} names {unknown[0]}, which is not in {section}"
            raise ConfigError(f"{where(key)}: {problem}. Use one of {available}.")


def _check_names_of_runs(params: Params, where: Callable[[str], str]) -> None:
    """Check that no two methods and partitions share a folder, which hyphens in their names can cause."""
    owners: dict[str, tuple[str, str]] = {}
    for pair in itertools.product(params.methods, params.partitions):
        method, partition = owners.setdefault("-".join(pair), pair)
        if (method, partition) != pair:
            raise ConfigError(
                f"{where('partitions')}: partitions: method {method} on partition {partition} and method {pair[0]} on "
                f"partition {pair[1]} would both be results/{'-'.join(pair)}. Rename one of them."
            )
