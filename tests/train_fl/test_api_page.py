"""docs/api.md names every loss, server update and partition with its arguments."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

from stages.train_fl import guidance, losses, methods, partitions

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
MODULES = [losses, guidance] + [
    importlib.import_module(f"{methods.__name__}.{module.name}")
    for module in pkgutil.iter_modules(methods.__path__)
    if module.name != "base"
]


def argument(name, default):
    if default is inspect.Parameter.empty:
        return name
    return f'{name}="{default}"' if isinstance(default, str) else f"{name}={default}"


def described(function):
    arguments = [argument(name, p.default) for name, p in inspect.signature(function).parameters.items()]
    return f"{function.__name__}({', '.join(arguments)})" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rsplit(".", 1)[1])
def test_every_function_is_on_the_page_with_its_arguments(module):
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__ and not name.startswith("_") and name != "subtract":
            assert described(function), name


def test_every_partition_is_on_the_page_with_its_arguments():
    for name in set(partitions.__all__) - {"assign"}:
        assert described(getattr(partitions, name)), name


def test_examples_print_what_the_page_says():
    tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried.attempted > 70 and tried.failed == 0
