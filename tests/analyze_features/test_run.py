"""The stage on a small real project: its output, its reproducibility, and its errors."""

import json
import logging
import subprocess
import sys

import numpy as np

from stages.analyze_features import tsne
from stages.analyze_features.run import _tell_whether_guidance_can_pay
from tests.analyze_features.test_probes import settings
from tests.conftest import invoke

FAST = ("--splits", "1", "--tsne-images", "20")


def analyse(root, *arguments):
    invoked = invoke(root, "analyze-features", *FAST, *arguments)
    assert invoked.exit_code == 0, invoked.output
    folder = root / "analysis"
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_analysis_covers_all_layers_and_classes_and_is_reproducible(project):
    first = analyse(project, "--images", "80")
    assert set(first) == {"features.json", "details.json", "clusters.svg", "tsne.svg", "prompts.svg"}
    assert analyse(project, "--images", "80") == first
    found = json.loads(first["details.json"])
    fused = found["layers"]["fused"]
    assert json.loads(first["features.json"]) == {"probe": fused["probe_accuracy"], "margin": fused["margin"]}
    assert list(found["layers"]) == ["up_blocks.1", "up_blocks.2", "up_blocks.3", "fused"]
    assert found["layers"]["fused"]["dims"] == 64 + 48 + 32
    assert found["images"] == 80 and len(found["classes"]) == 10
    assert found["chance"]["matching_nearest"] == 0.5  # the matching prompt and a negative
    classes = [of_class["margin"] for of_class in found["classes"].values()]
    assert min(classes) < found["layers"]["fused"]["margin"] < max(classes)


def test_a_sentence_says_whether_the_prompts_are_told_apart(project, caplog):
    separation = json.loads(analyse(project, "--images", "80")["details.json"])["layers"]["fused"]["separation"]
    assert (
        f"The model tells prompts apart (separation {separation:.4f}), which TDCL needs."
        in invoke(project, "analyze-features", *FAST, "--images", "80").output
    )
    logger = logging.getLogger("stages.analyze_features.run")
    logger.addHandler(caplog.handler)  # the command above has changed where messages go
    _tell_whether_guidance_can_pay(2e-6)
    logger.removeHandler(caplog.handler)
    (record,) = caplog.records
    assert record.getMessage().startswith("The model hardly tells prompts apart (separation 2e-06, below 0.001)")


def test_missing_features_name_the_command_to_run(project):
    invoked = invoke(project, "analyze-features", "--set", "extract_features.timestep=1")
    assert invoked.exit_code == 1
    assert (
        "digits-tiny-sd-t1 holds no feature set (the folder does not exist). Run `pipeline extract-features`"
        in invoked.output
    )


def test_the_stage_imports_without_diffusers():
    """Someone who only pulled a feature set can then analyse it."""
    code = "import sys, stages.analyze_features; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_dimension_and_few_points_can_be_embedded():
    points = tsne.embed(np.arange(6.0)[:, None], settings())
    assert points.shape == (6, 2) and np.isfinite(points).all()
