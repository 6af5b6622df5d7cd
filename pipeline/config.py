"""The configuration: params.yaml, read, checked against `pipeline.params`, and where the project's files stand.

An unknown key, a missing one, a wrong type or a value out of range is one line that names file, key, value and what
is allowed. The file is read as YAML 1.2, as DVC reads it (PyYAML's 1.1 would make `1e-4` a string).
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.errors import PipelineError
from pipeline.params import METHODS, PARTITIONS, Params, Section


class Config:
    """Checked parameters and the layout of the project's files, relative to the folder of params.yaml."""

    def __init__(self, params: Params, root: Path) -> None:
        """Holds `params` for a project whose files stand under `root`."""
        self.params = params
        self.root = root

    @property
    def dataset_dir(self) -> Path:
        """The prepared data set."""
        return self.root / "data" / "datasets" / self.params.prepare_data.name

    @property
    def backbone_dir(self) -> Path:
        """The frozen model's weights, which neither git nor DVC tracks."""
        return self.root / "models" / self.params.prepare_backbone.name

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
    def results_dir(self) -> Path:
        """One folder a run."""
        return self.root / "results"

    def run_dir(self, method: str, partition: str, seed: int) -> Path:
        """The folder of one run of the sweep."""
        return self.results_dir / f"{method}-{partition}-s{seed}"

    def settings(self, section: Literal["methods", "partitions"], name: str) -> Section:
        """The settings of a named method or partition.

        Raises:
            PipelineError: there is no such name; the message lists those there are.
        """
        known: Mapping[str, Section] = getattr(self.params, section)
        if name not in known:
            raise PipelineError(f"params.yaml has no {section}.{name}; it has {', '.join(known)}")
        return known[name]


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads and checks params.yaml.

    Args:
        path: the file.
        overrides: dotted key -> value, put over the file's values for this run ("train_fl.num_rounds": 3).

    Raises:
        PipelineError: the file is missing or not YAML, or a key is unknown, missing, of a wrong type or range.
    """
    values = _read_yaml(path)
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    try:
        return Config(Params.model_validate(values), path.resolve().parent)
    except ValidationError as error:
        lines = [_explain(path, detail) for detail in error.errors()]
        raise PipelineError("\n".join(lines)) from None


def parse_value(text: str) -> Any:
    """A value typed on the command line, read as it would be in params.yaml; an empty text is an empty string."""
    from ruamel.yaml import YAML, YAMLError

    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return text
    return text if value is None and text not in ("null", "~") else value


def _read_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML, YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing: run in the project's folder, or name the file by --params") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} cannot be read: {error}") from None
    except YAMLError as error:
        raise PipelineError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise PipelineError(f"{path} must hold sections (prepare_data, ...), not {type(values).__name__}")
    return values


def _set(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    *parents, key = dotted_key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise PipelineError(f"cannot set {dotted_key}: {parent} is a value, not a section")
    values[key] = value


def _explain(path: Path, detail: Mapping[str, Any]) -> str:
    """One line of the form `params.yaml: train_fl.batch_size = 0: input should be greater than or equal to 1`."""
    location = [str(part) for part in detail["loc"] if not str(part).startswith(("constrained-", "literal[", "int"))]
    if len(location) > 3 and location[0] in ("methods", "partitions"):
        location = [*location[:2], *location[3:]]  # pydantic names the union's branch here
    key = ".".join(location)
    kind, message = detail["type"], detail["msg"][0].lower() + detail["msg"][1:]
    if kind == "missing":
        return f"{path}: {key} is missing"
    if kind == "extra_forbidden":
        allowed = _allowed_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(allowed)}"
        return f"{path}: {key} is not a known key; {hint}"
    return f"{path}: {key} = {detail['input']!r}: {message}"


def _allowed_keys(section: list[str]) -> list[str]:
    if not section:
        return list(Params.model_fields)
    if section[0] in ("methods", "partitions"):
        models = METHODS if section[0] == "methods" else PARTITIONS
        return sorted({name for model in models for name in model.model_fields})
    annotation = Params.model_fields[section[0]].annotation
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, Section) else []
