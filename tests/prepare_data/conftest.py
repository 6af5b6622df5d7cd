"""Run prepare-data as a user does, in a separate project."""

from types import SimpleNamespace

import pytest

from pipeline.data.datasets import PreparedDataset
from tests.conftest import invoke, write_params


@pytest.fixture
def prepare(tmp_path):
    """prepare(source=..., path=..., ...) -> exit code, output, and the data set if there is one."""
    project = tmp_path / "project"
    project.mkdir()
    write_params(
        project, {"prepare_data.train_subset": None, "prepare_data.name": "probe", "prepare_data.image_size": 8}
    )
    folder = project / "data" / "datasets" / "probe"

    def run(**keys):
        flags = [part for key, value in keys.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        result = invoke(project, "prepare-data", *flags)
        dataset = PreparedDataset(folder) if result.exit_code == 0 else None
        return SimpleNamespace(exit_code=result.exit_code, output=result.output, dataset=dataset, folder=folder)

    return run
