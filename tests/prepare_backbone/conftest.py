"""A hub on loopback that has tiny-sd as org/model."""

import shutil

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tests.prepare_backbone.hub_server import HubServer
from tests.prepare_backbone.test_tiny_sd import SHIPPED


@pytest.fixture
def hub(tmp_path, monkeypatch):
    shutil.copytree(SHIPPED, tmp_path / "hub" / "org" / "model")
    server = HubServer(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    close_session()
    server.close()
