"""Runs prepare-data as a user does, in a project of its own."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.cli import main
from pipeline.datasets import PreparedDataset

PARAMS = Path(__file__).parents[2] / "params.yaml"


@pytest.fixture
def prepare(tmp_path):
    """prepare(source=..., path=..., ...) -> exit code, one line of error, and the data set if there is one."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(PARAMS, project)

    def run(**keys):
        keys = {"name": "probe", "image_size": "8"} | {key: str(value) for key, value in keys.items()}
        flags = [part for key, value in keys.items() for part in (f"--{key.replace('_', '-')}", value)]
        result = CliRunner().invoke(main, ["--params", str(project / "params.yaml"), "prepare-data", *flags])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        dataset_dir = project / "data" / "datasets" / keys["name"]
        dataset = PreparedDataset(dataset_dir) if result.exit_code == 0 else None
        return SimpleNamespace(exit_code=result.exit_code, output=result.output, dataset=dataset, dir=dataset_dir)

    return run


def save_plain(path: Path, colour, size=(8, 8)) -> None:
    """An image file of one colour; PNG keeps it exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path)


def colours(images: np.ndarray) -> list[tuple[int, ...]]:
    """The colour in the middle of each image, uint8 (N, H, W, 3)."""
    return [tuple(int(value) for value in image[image.shape[0] // 2, image.shape[1] // 2]) for image in images]
