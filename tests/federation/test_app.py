"""What `flwr run` sends to the nodes, and which settings it accepts."""

import io
import tomllib
import zipfile

import pytest
from flwr.cli.build import build_fab_from_disk

import pipeline
from pipeline.errors import PipelineError
from stages.train_fl import run
from tests.conftest import REPOSITORY
from tests.integration.project import copy_repository
from tests.train_fl import tiny_project

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_versions_are_equal():
    assert PROJECT["project"]["version"] == pipeline.__version__


def test_bundle_has_code_and_settings_but_no_data(tmp_path):
    copy_repository(tmp_path)  # Flower reads every file, and the repository itself may hold an environment of 50,000
    for name in ("data/datasets/own/images.py", ".venv/lib/code.py", "results/a-b/s0/model.py", "notes.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# private")
    names = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path))).namelist()
    code = {
        path.relative_to(REPOSITORY).as_posix()
        for top in ("pipeline", "stages")
        for path in (REPOSITORY / top).rglob("*.py")
    }
    others = {"pyproject.toml", "params.yaml", "pipeline/diffusion/tiny_imagenet.json", ".info/CONTENT"}
    assert set(names) == code | others


def test_every_run_config_key_is_read():
    sources = [
        path.read_text() for top in ("pipeline/federation", "stages") for path in (REPOSITORY / top).rglob("*.py")
    ]
    for key in PROJECT["tool"]["flwr"]["app"]["config"]:
        assert any(f'"{key}"' in text for text in sources), key


def test_partition_over_nodes_is_rejected_by_the_local_engine(tmp_path):
    project = tiny_project.make(tmp_path, partitions={"nodes": {"kind": "nodes"}})
    with pytest.raises(PipelineError, match=r"partitions.nodes needs a federation .* `flwr run`"):
        run(project, "fedavg", "nodes", 0)
