"""examples/quickstart.ipynb runs from top to bottom in a fresh kernel, and is committed without outputs."""

import os
import subprocess
import sys

import nbformat
import pytest

from tests.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell) -> str:
    return "".join(
        output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in cell.outputs
    )


def test_notebook_is_committed_without_outputs():
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


SMALLER = {"local_epochs=5": "local_epochs=1", "train_subset=300": "train_subset=150"}


@pytest.mark.parametrize(
    ("changes", "images"), [(SMALLER, 150), pytest.param({}, 300, marks=pytest.mark.faults)], ids=["smaller", "whole"]
)
def test_notebook_runs(tmp_path, changes, images):
    """Execute it with nbclient in a separate process with this environment's kernel, and check its output."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    for written, smaller in changes.items():
        assert text.count(written) == 1
        text = text.replace(written, smaller)
    (tmp_path / "quickstart.ipynb").write_text(text, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "IPYTHONDIR": str(tmp_path), "JUPYTER_PREFER_ENV_PATH": "1"}
    command = [
        sys.executable,
        "-c",
        "import nbclient.cli; nbclient.cli.main()",
        "--kernel_name",
        "python3",
        "--timeout",
        "240",
    ]
    command += ["--output", str(tmp_path / "executed.ipynb"), str(tmp_path / "quickstart.ipynb")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    cells = code_cells(nbformat.read(tmp_path / "executed.ipynb", as_version=4))
    plots = [
        number
        for number, cell in enumerate(cells)
        if any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]
    assert len(plots) == 2 and plots[0] <= 2  # cached features are plotted within the first cells
    shown = "\n".join(map(text_of, cells))
    assert f"{images} images" in shown and "TDCL:" in shown and "feddifrc" in shown
