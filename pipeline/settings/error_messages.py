"""Explain invalid parameters: one line per key, with where it was set, its value and what is allowed.

Pydantic reports an error per branch of a union, with the branch's name in the key's path; these are merged.
"""

import difflib
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipeline.settings.params import METHODS, PARTITIONS, Params, Section

_NAMED = {"methods": (METHODS.values(), "algorithm"), "partitions": (PARTITIONS, "kind")}
"""Sections of named settings: the models of an entry, and the key that selects one."""


def explain(error: ValidationError, values: Mapping[str, Any], where: Callable[[str], str]) -> str:
    """Return a line per key: where it was set, the key, its value among `values`, and what is allowed."""
    problems: dict[str, list[str]] = {}
    for detail in error.errors():
        key, problem = _problem(detail, values)
        problems.setdefault(key, []).append(problem)
    lines = []
    for key, found in problems.items():
        value = found[0].partition(": ")[0] + ": "  # repeated by every alternative
        alternatives = [found[0], *(problem.removeprefix(value) for problem in found[1:])]
        lines.append(f"{where(key)}: {key}{' or '.join(dict.fromkeys(alternatives))}")
    return "\n".join(lines)


def models_of(section: str, name: str | None = None, values: Mapping[str, Any] | None = None) -> list[type[Section]]:
    """Return the models of a section, or of a named method or partition the one that its values select."""
    if section in _NAMED:
        models, selector = _NAMED[section]
        chosen = ((values or {}).get(section) or {}).get(name) if name else None
        tag = chosen.get(selector) if isinstance(chosen, Mapping) else None
        fitting = [model for model in models if tag in get_args(model.model_fields[selector].annotation)]
        return fitting or list(models)
    return _sections(Params.model_fields[section].annotation) if section in Params.model_fields else []


def allowed(field: FieldInfo) -> str:
    """Describe the values of a key: "cifar10, digits or folder", "an integer >= 1 or null", "all or [A, B, ...]"."""
    words = _alternatives(field.annotation, field.metadata)
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _alternatives(annotation: Any, limits: Iterable[Any]) -> list[str]:
    """Describe each alternative of a type, numbers with their limits."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [limit for extra in parts[1:] for limit in getattr(extra, "metadata", [extra])]
        return _alternatives(parts[0], [*limits, *inner])
    if origin in (Union, types.UnionType):
        return [kind for part in parts for kind in _alternatives(part, limits)]
    if origin is Literal:
        return [str(value) for value in parts]
    if origin is list:
        return ["[A, B, ...]"]
    if annotation not in (int, float):
        return [{bool: "true or false", types.NoneType: "null"}.get(annotation, "text")]
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{signs[name]} {getattr(limit, name):g}" for limit in limits for name in signs if hasattr(limit, name)]
    return [" ".join(["an integer" if annotation is int else "a number", " and ".join(bounds)]).strip()]


def _problem(detail: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[str, str]:
    """Return the dotted key and the rest of its line."""
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    location = _as_written(detail["loc"], values, keep_last=kind == "missing")
    key = ".".join(map(str, location))
    message = detail["msg"][0].lower() + detail["msg"][1:]
    if kind == "missing":
        return key, " is missing"
    selector = f"{key}.{context.get('discriminator', '').strip(chr(39))}"
    if kind == "union_tag_not_found":
        return selector, " is missing"
    if kind == "union_tag_invalid":
        return selector, f" = {_shown(context['tag'])}: input should be one of {context['expected_tags']}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return key, f" = {_shown(given)}: must be a section with its keys below it"
    if kind == "extra_forbidden":
        return key, f" is not a known key; {_hint(str(location[-1]), _allowed_keys(location[:-1], values))}"
    if detail["loc"][-1] == "[key]":
        return key, f" is not a valid name: {message}"
    return key, f" = {_shown(given)}: {message}"


def _shown(value: Any) -> str:
    """Write a value as Python does, cut short, because YAML aliases can make a small file a huge value."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, 200, 200, 200
    try:
        return short.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _as_written(loc: tuple[str | int, ...], values: Any, keep_last: bool) -> list[str | int]:
    """Return a location's parts without pydantic's names of a union's branches, which are not in the values."""
    kept: list[str | int] = []
    for position, part in enumerate(loc):
        if isinstance(values, Mapping) and part in values or isinstance(values, list) and isinstance(part, int):
            kept.append(part)
            values = values[part]  # type: ignore[index]
        elif keep_last and position == len(loc) - 1:
            kept.append(part)
    return kept


def _hint(unknown: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(unknown, allowed, n=1)
    return f"did you mean {near[0]}?" if near else f"allowed here: {', '.join(allowed)}"


def _allowed_keys(section: list[str | int], values: Mapping[str, Any]) -> list[str]:
    if not section:
        return list(Params.model_fields)
    first, *inner = map(str, section)
    name = inner.pop(0) if first in _NAMED and inner else None
    models = models_of(first, name, values)
    for part in inner:  # a section inside a section: a method's guidance
        models = [found for model in models for found in _sections(model.model_fields[part].annotation)]
    return sorted({name for model in models for name in model.model_fields})


def inner_sections(model: type[Section]) -> dict[str, list[type[Section]]]:
    """Return the sections that a section's keys can have as values, by key: those of a method's `guidance`."""
    found = {name: _sections(field.annotation) for name, field in model.model_fields.items()}
    return {name: sections for name, sections in found.items() if sections}


def _sections(annotation: Any) -> list[type[Section]]:
    kinds = (annotation, *get_args(annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
