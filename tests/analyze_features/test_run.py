"""The stage on a small real project: its output, its reproducibility, and its errors."""

import json
import logging
import shutil
import subprocess
import sys

import numpy as np

from stages.analyze_features import tsne
from stages.analyze_features.run import _verdict
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


def test_sentences_say_what_the_losses_can_build_on(project):
    found = json.loads(analyse(project, "--images", "80")["details.json"])
    fused, said = found["layers"]["fused"], invoke(project, "analyze-features", *FAST, "--images", "80").output
    assert all(text in said for text in found["verdict"]) and len(found["verdict"]) == 3
    probe, error = 100 * fused["probe_accuracy"], 100 * fused["probe_error"]
    assert f"a linear probe reaches {probe:.1f} ± {error:.1f} % (chance " in found["verdict"][0]
    separation = f"The model tells prompts apart (separation {fused['separation']:.4f}), which TDCL needs."
    assert found["verdict"][1] == separation


def test_sentences_warn_of_features_without_information():
    chance = {"probe_accuracy": 0.25, "matching_nearest": 0.5}

    def verdict(**of_set):
        usual = {"probe_accuracy": 0.36, "probe_error": 0.05, "separation": 0.02}
        return _verdict(usual | {"matching_nearest": 0.41, "nearest_error": 0.05} | of_set, chance)

    share = "The matching prompt is the nearest for {} ± 5.0 % of the images"
    levels, (probe, apart, nearest) = zip(*verdict(), strict=True)
    assert levels == (logging.INFO,) * 3
    assert probe.endswith("tell something of the classes: a linear probe reaches 36.0 ± 5.0 % (chance 25.0 %).")
    assert nearest == f"{share.format('41.0')} (chance 50.0 %)."  # by 1.8 standard errors
    level, text = verdict(probe_accuracy=0.34)[0]  # above chance by 1.8 standard errors
    assert level == logging.WARNING and "tell nothing of the classes: a linear probe reaches 34.0 ± 5.0 %" in text
    level, text = verdict(separation=2e-6)[1]
    assert level == logging.WARNING and text.startswith("The model hardly tells prompts apart (separation 2e-06, below")
    level, text = verdict(matching_nearest=0.3)[2]
    assert level == logging.WARNING
    assert text == f"{share.format('30.0')}, less often than by chance (50.0 %): check the prompts."


def test_a_set_of_other_settings_or_images_is_named(project, tmp_path):
    root = tmp_path / "own"
    shutil.copytree(project, root)
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("a photo of a {class_name}", "{class_name}"))
    said = invoke(root, "analyze-features", *FAST).output
    assert "was extracted with prompt_templates ['a photo of a {class_name}'], but extract_features here has" in said
    assert "was extracted with" not in invoke(project, "analyze-features", *FAST).output
    assert invoke(root, "prepare-data", "--train-subset", "50").exit_code == 0
    assert "was extracted from another data set (120 images" in invoke(root, "analyze-features", *FAST).output
    (root / "data" / "datasets" / "digits" / "manifest.json").write_text("{")
    result = invoke(root, "analyze-features", *FAST)
    assert result.exit_code == 0 and "datasets/digits/manifest.json" in result.output


def test_numbers_of_a_set_with_noise_are_no_verdict(project, tmp_path):
    root = tmp_path / "own"
    shutil.copytree(project, root)
    tar = str(root / "noisy.tar")
    assert invoke(root, "features", "export", "digits-tiny-sd-t300", "--noise", "8", "-o", tar).exit_code == 0
    shutil.rmtree(root / "data" / "features")
    assert invoke(root, "features", "import", tar).exit_code == 0
    said = invoke(root, "analyze-features", *FAST).output
    assert "The set has noise of 8 standard deviations" in said and "tells prompts apart" not in said
    (only,) = json.loads((root / "analysis" / "details.json").read_text())["verdict"]
    assert only in said


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
