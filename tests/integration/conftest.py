"""A `pipeline` that starts in milliseconds, for tests in which DVC starts it many times; one thread for federations."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.integration import forked


@pytest.fixture(scope="session")
def quick_bin() -> Iterator[Path]:
    """The folder of this `pipeline`."""
    with tempfile.TemporaryDirectory(prefix="bin-") as name:  # the address of a socket must be short
        folder = Path(name)
        address = folder / "address"
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.forked", str(address)], cwd=REPOSITORY, stdin=subprocess.PIPE
        )
        while not address.exists():
            assert server.poll() is None
            time.sleep(0.01)
        forked.write_program(folder, address)
        yield folder
        server.communicate()


@pytest.fixture
def one_thread(monkeypatch):
    """Use one thread for nodes and local engine: the number of threads changes last bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
