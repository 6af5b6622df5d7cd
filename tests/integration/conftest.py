"""Programs that start in milliseconds, for tests in which DVC and Flower start them many times."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import forked


@pytest.fixture(scope="session")
def quick_bin() -> Iterator[Path]:
    """The folder of these programs."""
    with tempfile.TemporaryDirectory(prefix="bin-") as name:
        forked.write_programs(Path(name), "pipeline", "dvc", "flwr", "flwr-clientapp", "flwr-serverapp")
        yield Path(name)


@pytest.fixture
def one_thread(monkeypatch):
    """Use one thread for nodes and local engine: the number of threads changes last bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
