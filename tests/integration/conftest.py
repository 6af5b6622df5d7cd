"""Programs that start in milliseconds, for tests in which DVC and Flower start them many times."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.integration import forked


@pytest.fixture(scope="session")
def quick_bin() -> Iterator[Path]:
    """The folder of these programs."""
    with tempfile.TemporaryDirectory(prefix="bin-") as name:
        flower = (
            "flwr",
            "flwr-clientapp",
            "flwr-serverapp",
            "flower-superlink",
            "flower-supernode",
            "flower-superexec",
        )
        forked.write_programs(Path(name), "pipeline", "dvc", *flower)
        yield Path(name)


@pytest.fixture
def app(tmp_path) -> Path:
    """A copy of the files that Flower bundles, without the rest of the repository, which takes long to search."""
    folder = tmp_path / "app"
    for name in ("pipeline", "stages"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "params.yaml"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.fixture
def one_thread(monkeypatch):
    """Use one thread for nodes and local engine: the number of threads changes last bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
