"""Small real projects: the repository's own params.yaml, scaled down to run in seconds."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

import stages.train_fl.methods  # noqa: F401  registers the methods' settings
from pipeline.cli.commands import main

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-")  # read when huggingface_hub is imported
os.environ["HF_HUB_OFFLINE"] = "1"  # tests of downloads start their own server

REPOSITORY = Path(__file__).parents[1]

SMALL = {
    "prepare_data.train_subset": 120,
    "extract_features.basis_images": 40,
    "extract_features.rows_per_shard": 50,
    "train_fl.num_clients": 3,
    "train_fl.clients_per_round": 2,
    "train_fl.num_rounds": 2,
    "train_fl.local_epochs": 1,
    "sweep.partitions": ["dir05"],
    "sweep.seeds": [0],
    "runtime.device": "cpu",
}


def write_params(root: Path, changes: Mapping[str, Any]) -> Path:
    """Write the repository's params.yaml, overridden by SMALL and `changes` (dotted keys), into `root`."""
    yaml = YAML()
    params = yaml.load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    for dotted, value in {**SMALL, **changes}.items():
        section, key = dotted.split(".")
        params[section][key] = value
    with (root / "params.yaml").open("w", encoding="utf-8") as stream:
        yaml.dump(params, stream)
    return root / "params.yaml"


Pipeline = Callable[..., Result]


def invoke(root: Path, *arguments: str) -> Result:
    """Run one command in the project at `root`, in this process."""
    return CliRunner().invoke(main, ["--params", str(root / "params.yaml"), *arguments], catch_exceptions=False)


@pytest.fixture(scope="session")
def extracted(tmp_path_factory) -> Path:
    """Make a small project with data, backbone and features; tests share it and must not modify it."""
    root = tmp_path_factory.mktemp("extracted")
    write_params(root, {})
    for command in ("prepare-data", "prepare-backbone", "extract-features"):
        result = invoke(root, command)
        assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def project(extracted, tmp_path) -> Path:
    """Make a project that shares the data and features of `extracted` through a link."""
    write_params(tmp_path, {})
    (tmp_path / "data").symlink_to(extracted / "data")
    return tmp_path
