"""Every command that loads the frozen model runs in every type, on the CPU."""

import importlib
import json

import pytest
import torch
from click.testing import CliRunner

from pipeline.diffusion import backbones
from stages.extract_features.cost import count_flops
from tests.conftest import REPOSITORY, invoke
from tests.extract_features import tiny_models
from tests.extract_features.fixtures import project

DTYPES = ["float32", "bfloat16", "float16"]
COMMANDS = {
    "extraction": ("extract-features", "--negatives", "1", "--overwrite"),
    "dry run": ("extract-features", "--negatives", "1", "--dry-run"),
    "sweep": (
        "sweep-features",
        "--timesteps",
        "[300]",
        "--images",
        "12",
        "--margin-images",
        "2",
        "--basis-images",
        "4",
    ),
    "dry run of a sweep": ("sweep-features", "--timesteps", "[300]", "--images", "12", "--dry-run"),
    "synthesis": ("synthesize", "--images-per-class", "1", "--num-inference-steps", "1"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return project(tmp_path_factory.mktemp("dtypes") / "p", images=12, basis_images=4)


@pytest.mark.usefixtures("quick_dry_runs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(root, command, dtype, capfd):
    sections = [f"--set=extract_features.dtype={dtype}", f"--set=synthesize.dtype={dtype}"]
    sections.append("--set=runtime.unet_batch_size=16")  # float16 takes long on a CPU
    result = invoke(root, *COMMANDS[command], *sections)
    assert result.exit_code == 0, result.output
    assert "Pipelines loaded with" not in result.output + capfd.readouterr().err


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_benchmark_of_extraction_runs(monkeypatch, dtype):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    benchmark = importlib.import_module("extract")
    sizes = ["--images", "2", "--baseline-images", "1", "--classes", "1", "--image-size", "16"]
    result = CliRunner().invoke(benchmark.main, [*sizes, "--dtype", dtype], catch_exceptions=False)
    found = json.loads(result.output.splitlines()[-1])
    assert found["setting"]["dtype"] == dtype and found["rows"][0]["flops_per_image"] > 0


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_operations_are_counted_alike_in_every_type(tmp_path, family):
    path = tiny_models.FAMILIES[family](tmp_path / "m")
    prompts = ["tench"] if family == "dit" else ["a cat"]
    counted = set()
    for dtype in DTYPES:
        backbone = backbones.load(path, "auto", "cpu", getattr(torch, dtype))
        counted.add(count_flops(path, "auto", 64, backbone.encode_prompts(prompts)))
    assert len(counted) == 1 and min(counted.pop()) > 0
