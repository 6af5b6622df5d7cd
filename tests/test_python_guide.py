"""The Python examples of README.md and docs/python.md run, in order, in a small project."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from pipeline.settings import params
from tests.conftest import REPOSITORY, invoke


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(encoding="utf-8"), re.DOTALL)


def run_examples(page: str) -> tuple[dict, str]:
    """Run a page's examples in one namespace; return it, and what they printed."""
    namespace: dict = {"__name__": "examples"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for number, code in enumerate(examples(page)):
            exec(compile(code, f"{page}, example {number}", "exec"), namespace)
    return namespace, printed.getvalue()


@pytest.fixture
def trained(project, monkeypatch) -> Path:
    """A project with two finished runs as the working directory; params.yaml is deleted."""
    monkeypatch.setattr(params, "METHODS", dict(params.METHODS))  # the guide defines a method
    for method in ("fedavg", "feddifrc"):
        result = invoke(project, "train-fl", "--method", method, "--partition", "dir05", "--seed", "0")
        assert result.exit_code == 0, result.output
    (project / "params.yaml").unlink()
    monkeypatch.chdir(project)
    return project


def test_readme_example_runs(trained):
    names, printed = run_examples("README.md")
    assert names["rows"].denoised.shape == (64, names["features"].manifest.content.num_dims)
    assert names["embeddings"].grad.abs().sum() > 0
    assert "feddifrc" in printed


def test_guide_runs(trained):
    names, printed = run_examples("docs/python.md")
    assert "digits-tiny-sd-t300" in printed
    assert len(names["history"].rows) == len(names["smooth"].rows) == 3
    assert all(0 <= row["accuracy"] <= 1 for row in names["history"].rows)
    assert sum(map(len, names["parts"])) == len(names["features"]) == 120
    assert names["batch"]["denoised"].shape == (64, names["features"].manifest.content.num_dims)
    assert names["standardised"].shape == (64, names["features"].manifest.content.num_dims)
    assert len(names["run"].rounds) == 2
    assert "holds no feature set" in printed
