"""examples/quickstart.ipynb runs from top to bottom in a fresh kernel, and is committed without outputs."""

import sys

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from stages.train_fl import methods
from tests.conftest import REPOSITORY

needs_method_classes = pytest.mark.skipif(not hasattr(methods, "FedDifRC"), reason="needs the class FedDifRC")
NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"


def text_of(cell) -> str:
    return "".join(
        output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in cell.outputs
    )


def test_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@needs_method_classes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets of the kernel's client
def test_notebook_runs(tmp_path, monkeypatch):
    """Run it with this environment's Python, whatever kernels the machine has, and look at what it shows."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    manager = AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec_manager = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
    manager.kernel_spec.argv[0] = sys.executable
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, km=manager, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    plots = [cell for cell in code if any("image/png" in output.get("data", {}) for output in cell.outputs)]
    assert len(plots) == 2 and code.index(plots[0]) <= 2  # the first plot comes within the first cells
    shown = "\n".join(map(text_of, code))
    assert "300 images" in shown and "TDCL:" in shown and "feddifrc" in shown
