"""The house's rules, read from the imports and calls of the code itself."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/**/*.py")])


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_tree_is_where_we_look():
    assert len(FILES) > 30


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_stage_imports_no_other_stage_and_the_corridor_none(file):
    parts = file.relative_to(ROOT).parts
    if parts == ("pipeline", "cli", "commands.py"):  # the command line is above the stages
        return
    own = f"stages.{parts[1]}" if parts[0] == "stages" and len(parts) > 2 else None
    foreign = {
        name
        for name in imports(file)
        if name.startswith("stages.") and not (own and (name == own or name.startswith(own + ".")))
    }
    assert not foreign


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_training_imports_without_diffusers():
    unwanted = ("diffusers", "transformers", "torchvision")
    code = f"import sys, stages.train_fl; print([m for m in {unwanted} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_help_needs_neither_torch_nor_time():
    code = "import sys\nfrom pipeline.cli import main\nmain(['--help'], standalone_mode=False)\n"
    code += "assert not {'torch', 'numpy', 'h5py'} & set(sys.modules)"
    started = time.perf_counter()
    assert "extract-features" in run_python(code)
    assert time.perf_counter() - started < 3  # a third of a second on an idle machine; this one may be busy
