"""A hub on loopback that has tiny-sd as org/model."""

import shutil

import pytest

from tests.prepare_backbone.hub_server import serving
from tests.prepare_backbone.test_tiny_sd import SHIPPED


@pytest.fixture
def hub(tmp_path, monkeypatch):
    shutil.copytree(SHIPPED, tmp_path / "hub" / "org" / "model")
    with serving(tmp_path / "hub", tmp_path / "cache", monkeypatch) as server:
        yield server
