"""docs/api.md: its examples run and print what it says, and no loss or server update is left out."""

import doctest
import inspect
from pathlib import Path

import pytest

from stages.train_fl import losses
from stages.train_fl.methods import (
    fedavg,
    fedavgm,
    fedcr,
    feddifrc,
    feddyn,
    fednh,
    fednova,
    fedproto,
    fedprox,
    scaffold,
)

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
MODULES = [losses, fedavg, fedavgm, fedcr, feddifrc, feddyn, fednh, fednova, fedproto, fedprox, scaffold]


def test_the_examples_run():
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 40 and result.failed == 0


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rsplit(".", 1)[1])
def test_every_function_is_on_the_page_with_its_arguments(module):
    page = PAGE.read_text(encoding="utf-8")
    functions = [f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]
    for function in functions:
        if not function.__name__.startswith("_") and function is not fedavg.subtract:
            signature = ", ".join(
                name
                if p.default is p.empty
                else f'{name}="{p.default}"'
                if isinstance(p.default, str)
                else f"{name}={p.default}"
                for name, p in inspect.signature(function).parameters.items()
            )
            assert f"{function.__name__}({signature})" in page
