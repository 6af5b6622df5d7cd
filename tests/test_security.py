"""Data never contain code: what the program's source must not import or call."""

import ast
import re
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.settings import config
from stages.prepare_backbone import run as prepare_backbone
from tests.conftest import write_params

ROOT = Path(__file__).parents[1]
FILES = sorted(file for folder in ("pipeline", "stages", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
FORBIDDEN = {
    # pickle and its kin
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.load", "torch.save",
    "torch.hub", "torch.jit.load", "torch.package", "torch.serialization", "numpy.load", "pandas.read_pickle",
    # code by name or as text
    "runpy", "imp", "code", "builtins.eval", "builtins.exec", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "importlib.util.spec_from_file_location",
    "importlib.machinery", "importlib.reload", "ctypes",
    # a shell, archives
    "shutil.unpack_archive", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    "extract", "extractall", "unpack_archive", "from_single_file", "load_lora_weights", "load_textual_inversion",
    "load_attn_procs", "load_ip_adapter", "load_custom_pipeline",
}  # fmt: skip
KEYWORDS = {"trust_remote_code", "allow_pickle", "shell", "custom_pipeline", "Loader"}
WITHOUT_WEIGHTS = re.compile("tokenizer|Tokenizer|Scheduler|AutoConfig")
COMPUTED = "importlib.import_module of a computed name"
# Modules whose names come from closed lists.
NAMES_OF_ITS_OWN = {"pipeline/federation/app.py", "stages/train_fl/loggers.py"}

# Pickles what a process and the workers that it forked say to each other; it never reads a file.
BETWEEN_OWN_PROCESSES = "stages/train_fl/engines/workers.py"

# Call functions of the C library that the process has loaded already; they load no file.
C_LIBRARY = {"pipeline/io/mapped.py": "CDLL(None, use_errno=True", "pipeline/memory.py": "CDLL(None"}


def findings(source: str) -> list[str]:
    """Return the forbidden uses in a module, under any alias."""
    tree = ast.parse(source)
    names = _imported(tree)
    used = list(names.values())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            used += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            used.append(_full_name(node, names))
        elif isinstance(node, ast.Call):
            found += _call(node, names)
            if _full_name(node.func, names) in ("?getattr", "importlib.import_module"):
                used.append(".".join(_full_name(argument, names) for argument in node.args[:2]))
    return found + [name for name in used if any(f"{name}.".startswith(f"{bad}.") for bad in FORBIDDEN)]


def _imported(tree: ast.AST) -> dict[str, str]:
    """Return local name -> dotted name."""
    names = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else []:
            if isinstance(node, ast.ImportFrom):
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            else:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
    return names


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    """Return a dotted name with aliases resolved, "?" before names that are not imported; return texts unchanged."""
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, names)}.{node.attr}"
    if isinstance(node, ast.Constant):
        return str(node.value)
    return names.get(node.id, f"?{node.id}") if isinstance(node, ast.Name) else "?"


def _call(node: ast.Call, names: dict[str, str]) -> list[str]:
    full = _full_name(node.func, names)
    name = full.rpartition(".")[2].lstrip("?")
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    found = [word for word in KEYWORDS & set(keywords)]
    filtered = name == "extract" and ast.unparse(keywords.get("filter", ast.Constant(None))) == "'data'"  # PEP 706
    if full.removeprefix("?") in BUILTINS or isinstance(node.func, ast.Attribute) and name in METHODS and not filtered:
        found.append(name)
    if re.fullmatch(r"os\.(exec|spawn|posix_spawn)\w*", full):
        found.append(full)
    if full == "importlib.import_module" and not isinstance(node.args[0], ast.Constant):
        found.append(COMPUTED)
    if name == "YAML" and "typ" in keywords and ast.unparse(keywords["typ"]) == "'unsafe'":
        found.append("YAML(typ='unsafe')")
    if name == "from_pretrained" and not WITHOUT_WEIGHTS.search(on := ast.unparse(node.func)):
        if ast.unparse(keywords.get("use_safetensors", ast.Constant(None))) != "True":
            found.append(f"{on} without use_safetensors=True")
    if name == "snapshot_download" and not {"revision", "allow_patterns"} <= set(keywords):
        found.append("snapshot_download without revision and allow_patterns")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_file_loads_code_or_unpacks_archives(file):
    name = file.relative_to(ROOT).as_posix()
    found = findings(file.read_text(encoding="utf-8"))
    if name == BETWEEN_OWN_PROCESSES:
        found = [use for use in found if not re.fullmatch(r"pickle(\.\w+)?|joblib\.cpu_count", use)]
    if name in C_LIBRARY:
        assert re.findall(r"(?:CDLL|LoadLibrary|PyDLL)\([^)]*", file.read_text(encoding="utf-8")) == [C_LIBRARY[name]]
        found = [use for use in found if not re.fullmatch(r"ctypes(\.\w+)*", use)]
    assert found == ([COMPUTED] if name in NAMES_OF_ITS_OWN else [])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "import pickle as p", "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')", "from torch import load", "from torch import load as read\nread('x')",
        "import torch\nread = torch.load", "import torch\ntorch.jit.load('x')", "from torch.jit import load",
        "import torch\ngetattr(torch, 'load')('x')", "import torch.hub", "import numpy as n\nn.load('x')",
        "import importlib\nimportlib.import_module('pickle')", "from importlib import import_module as i\ni('dill.x')",
        "import importlib\nimportlib.import_module(name)", "import runpy", "from runpy import run_path",
        "eval('1')", "import builtins as b\nb.exec('1')", "tar.extractall('.')",
        "tar.extract('x')", "tar.extract('x', filter='tar')", "from shutil import unpack_archive",
        "np.load('x', allow_pickle=True)", "run('ls', shell=True)", "import os\nos.system('ls')",
        "from os import popen", "import os\nos.execv('ls', [])", "import subprocess as s\ns.getoutput('ls')",
        "M.from_pretrained('x')", "M.from_pretrained('x', use_safetensors=True, trust_remote_code=True)",
        "M.from_single_file('x')", "pipe.load_lora_weights('x')", "snapshot_download('x')",
        "YAML(typ='unsafe')", "import yaml\nyaml.load(x, Loader=yaml.Loader)", "from yaml import load",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source):
    assert findings(source)


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.load(x)", "yaml = YAML()\nyaml.load(x)",
        "import torch\ntorch.loadtxt('x')", "from safetensors.torch import load_file",
        "import importlib\nimportlib.import_module('stages.report')", "import re\nre.compile('x')", "model.eval()",
        "from loading import load\nload('x')", "tar.extract('x', filter='data')",
    ],
)  # fmt: skip
def test_the_search_finds_nothing_else(source):
    assert findings(source) == []


@pytest.mark.parametrize("revision", ["null", "main", "v1.0", "451f4fe"])
def test_a_hub_model_must_be_pinned_to_a_commit(tmp_path, revision):
    changes = {
        "prepare_backbone.source": "org/model",
        "prepare_backbone.revision": None if revision == "null" else revision,
    }
    with pytest.raises(
        PipelineError,
        match=r"org/model needs a commit.*revision to a commit \(40 hexadecimal",
    ):
        prepare_backbone(config.load(write_params(tmp_path, changes)))
