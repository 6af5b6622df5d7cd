"""No code comes with data: what the program's own source may not import, call or ask for."""

import ast
import re
from pathlib import Path

import pytest

from pipeline import config
from pipeline.errors import PipelineError
from stages.prepare_backbone import run as prepare_backbone
from tests.conftest import write_params

ROOT = Path(__file__).parents[1]
FILES = sorted(file for folder in ("pipeline", "stages", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADS_CODE = {
    ("torch", "load"), ("torch", "save"), ("torch", "hub"), ("np", "load"), ("numpy", "load"), ("pd", "read_pickle"),
    ("yaml", "unsafe_load"), ("yaml", "full_load"),
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
UNPACKS = {"extract", "extractall", "unpack_archive"}
KEYWORDS = {"trust_remote_code", "allow_pickle", "shell", "custom_pipeline"}
WITHOUT_WEIGHTS = re.compile("tokenizer|Tokenizer|Scheduler|AutoConfig")


def findings(source: str) -> list[str]:
    """What a module does that it may not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PICKLES:
            found.append(node.module)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in LOADS_CODE:
                found.append(f"{node.value.id}.{node.attr}")
        if isinstance(node, ast.Call):
            found += _call(node)
    return found


def _call(node: ast.Call) -> list[str]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    on = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    found = [word for word in KEYWORDS & set(keywords)]
    if isinstance(node.func, ast.Name) and name in BUILTINS or name in UNPACKS:
        found.append(name)
    if name == "YAML" and "typ" in keywords and ast.unparse(keywords["typ"]) == "'unsafe'":
        found.append("YAML(typ='unsafe')")
    if name == "from_pretrained" and not WITHOUT_WEIGHTS.search(on):
        if ast.unparse(keywords.get("use_safetensors", ast.Constant(None))) != "True":
            found.append(f"{on}.from_pretrained without use_safetensors=True")
    if name == "snapshot_download" and not {"revision", "allow_patterns"} <= set(keywords):
        found.append("snapshot_download without revision and allow_patterns")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_file_loads_code_or_unpacks_archives(file):
    assert findings(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "import torch\ntorch.load('x')", "eval('1')", "tar.extractall('.')",
        "np.load('x', allow_pickle=True)", "run('ls', shell=True)", "M.from_pretrained('x')", "YAML(typ='unsafe')",
        "M.from_pretrained('x', use_safetensors=True, trust_remote_code=True)", "snapshot_download('x')",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source):
    assert findings(source)


@pytest.mark.parametrize("revision", ["null", "main", "v1.0", "451f4fe"])
def test_a_hub_model_must_be_pinned_to_a_commit(tmp_path, revision):
    changes = {
        "prepare_backbone.source": "org/model",
        "prepare_backbone.revision": None if revision == "null" else revision,
    }
    with pytest.raises(PipelineError, match="revision to a commit of org/model, 40 hexadecimal digits"):
        prepare_backbone(config.load(write_params(tmp_path, changes)))
