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

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-")  # read when the hub's client is imported
os.environ["HF_HUB_OFFLINE"] = "1"  # tests of the hub start a server of their own

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
    """The repository's params.yaml with SMALL and `changes` put over it (dotted keys), written into `root`."""
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
    """One command of the program in the project at `root`, in this process."""
    return CliRunner().invoke(main, ["--params", str(root / "params.yaml"), *arguments], catch_exceptions=False)


@pytest.fixture(scope="session")
def extracted(tmp_path_factory) -> Path:
    """A small project whose data, backbone and features are made; shared by tests, which must not change it."""
    root = tmp_path_factory.mktemp("extracted")
    write_params(root, {})
    for command in ("prepare-data", "prepare-backbone", "extract-features"):
        result = invoke(root, command)
        assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def project(extracted, tmp_path) -> Path:
    """A project of one's own on the data and features of `extracted`, which are shared by a link."""
    write_params(tmp_path, {})
    (tmp_path / "data").symlink_to(extracted / "data")
    return tmp_path
