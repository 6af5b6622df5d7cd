"""Which sources are directories and which are on the hub."""

import pytest

from pipeline.errors import PipelineError
from pipeline.hub import address
from pipeline.settings import config
from stages import prepare_backbone
from tests.conftest import write_params


@pytest.mark.parametrize("source", ["./sd", "../sd", "/models/sd", "~/sd", "$HOME/sd", "a/b/c", "sd/", "models/a/b"])
def test_directory_path_is_recognised(tmp_path, monkeypatch, source):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_params(tmp_path, {"prepare_backbone.source": source})
    with pytest.raises(PipelineError, match="does not exist") as error:
        prepare_backbone.run(config.load(tmp_path / "params.yaml"))
    place = str(tmp_path / "home" / "sd") if source[0] in "~$" else source.removeprefix("./").rstrip("/")
    assert place in str(error.value)


@pytest.mark.parametrize(
    "source", ["org/model", "org/model@main", "https://huggingface.co/org/model/tree/main", "hf.co/org/model/tree/main"]
)
def test_hub_address_is_not_a_path(source):
    assert not address.is_path(source)
