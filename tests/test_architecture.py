"""The rules of the code's structure, read from its imports."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/**/*.py")])


def imports(file: Path) -> set[str]:
    """Return what a module imports, also inside its functions, but not for type checkers only."""
    found = set()
    todo: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            todo += ast.iter_child_nodes(node)
    return found


def test_the_tree_is_where_we_look():
    assert len(FILES) > 30


# Packages and modules from the lowest layer to the highest. A module imports from its own layer or from lower ones.
LAYERS = {
    "pipeline": [
        ["errors", "text", "seeding", "accuracy", "sigterm", "threads", "memory"],
        ["io"],
        ["project"],
        ["provenance", "manifests", "settings", "devices", "progress", "plotting", "estimates"],
        ["data", "feature_store", "hub", "run_digests"],
        ["diffusion"],
        ["set_check"],
        ["federation", "cli"],
    ],
    "stages.train_fl": [
        ["losses", "encoders", "models", "augmentation", "partitions", "synthetic", "placement"],
        ["guidance", "images"],
        ["client_data"],
        ["graphs"],
        ["methods"],
        ["feature_check", "data", "client_states", "planned"],
        ["rounds", "evaluate", "probes"],
        ["checkpoint", "records"],
        ["loggers"],
        ["session"],
        ["engines"],
        ["run", "simulation", "cost"],
    ],
}
ABOVE_THE_STAGES = ("pipeline.cli", "pipeline.federation.app")


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("name", MODULES)
def test_stages_are_imported_only_by_themselves_and_from_above(name):
    own = ".".join(name.split(".")[:2]) if name.startswith("stages.") else None
    foreign = {
        other for other in imports(MODULES[name]) if other.startswith("stages.") and not (own and inside(other, own))
    }
    assert not foreign or any(inside(name, roof) for roof in ABOVE_THE_STAGES)


@pytest.mark.parametrize("package", LAYERS)
def test_no_import_goes_up_a_layer(package):
    layer = {f"{package}.{part}": number for number, parts in enumerate(LAYERS[package]) for part in parts}

    def layer_of(name: str) -> int | None:
        return next((number for part, number in layer.items() if inside(name, part)), None)

    own = {name: layer_of(name) for name in MODULES if inside(name, package) and name != package}
    assert not [name for name, number in own.items() if number is None and name != "pipeline.__main__"]
    up = [
        f"{name} imports {other}"
        for name, number in own.items()
        for other in imports(MODULES[name])
        if number is not None and (above := layer_of(other)) is not None and above > number
    ]
    assert not up


def test_modules_import_each_other_without_a_cycle():
    graph = {
        name: {
            found
            for other in imports(file)
            for found in [other if other in MODULES else other.rpartition(".")[0]]
            if found in MODULES and found != name and not inside(name, found)
        }
        for name, file in MODULES.items()
    }
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


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
