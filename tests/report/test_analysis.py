"""Figures of analyze-features and sweep-features: shown if they belong to the runs' data, named otherwise."""

import json

import pytest

from tests.conftest import invoke
from tests.report.grid import reseal, write_grid


@pytest.fixture
def project(tmp_path):
    write_grid(tmp_path, ["fedavg"], ["dir05"], [0], num_rounds=2)
    config = tmp_path / "results" / "fedavg-dir05" / "s0" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"features": "f" * 64}))
    reseal(config.parent)
    write_analysis(tmp_path, "f" * 64, "0" * 64)
    return tmp_path


def write_analysis(root, feature_set, dataset):
    folder = root / "analysis"
    (folder / "sweep").mkdir(parents=True, exist_ok=True)
    for name in ("clusters.svg", "prompts.svg", "tsne.svg", "sweep/sweep.svg", "sweep/maps-3.png", "sweep/maps-7.png"):
        (folder / name).write_text(f"picture {name}")
    details = {"feature_set": {"fingerprint": feature_set}, "verdict": ["It is <good>.", 3]}
    (folder / "details.json").write_text(json.dumps(details))
    (folder / "sweep" / "sweep.json").write_text(json.dumps({"made_of": {"dataset": {"hash": dataset}}}))
    (folder / "sweep" / "recommended.yaml").write_text("extract_features:\n  timestep: 50 # <best>\n")


def report(root, *flags):
    done = invoke(root, "report", *flags)
    assert done.exit_code == 0, done.output
    return (root / "report" / "index.html").read_text(), done.output


def test_shows_both_analyses_with_the_maps_of_one_image_and_the_recommendation(project):
    page, _ = report(project)
    assert page.count('src="data:image/svg+xml;base64,') == 3  # those that DVC's report stage depends on
    assert "<ul><li>It is &lt;good&gt;.</li></ul>" in page
    page, output = report(project, "--sweep")
    assert page.count('src="data:image/svg+xml;base64,') == 4 and page.count('src="data:image/png;base64,') == 1
    assert "timestep: 50 # &lt;best&gt;" in page and "Not in the report" not in output


@pytest.mark.parametrize(
    ("feature_set", "dataset", "reason", "left"),
    [
        ("e" * 64, "0" * 64, "analysis/ describes feature set eeeeeeee, which no run was trained on", 2),
        ("f" * 64, "1" * 64, "analysis/sweep describes another data set than the one the runs were trained on", 3),
    ],
)
def test_omits_an_analysis_of_other_data_and_says_why(project, feature_set, dataset, reason, left):
    write_analysis(project, feature_set, dataset)
    page, output = report(project, "--sweep")
    assert page.count('<img alt="') == left and ("It is" in page) == (feature_set == "f" * 64)
    assert f"Not in the report: {reason}" in output
    assert f"Not in this report: {reason}" in page


@pytest.mark.parametrize("broken", ["", "[]", "{", "[" * 100_000, '{"feature_set": 1, "made_of": {"dataset": null}}'])
def test_ignores_damaged_json(project, broken):
    (project / "analysis" / "details.json").write_text(broken)
    (project / "analysis" / "sweep" / "sweep.json").write_text(broken)
    assert "<img alt=" not in report(project, "--sweep")[0]


def test_skips_unreadable_figures_without_a_traceback(project):
    (project / "analysis" / "sweep" / "recommended.yaml").write_bytes(b"\xff\xfe")
    (project / "analysis" / "tsne.svg").unlink()
    (project / "analysis" / "tsne.svg").mkdir()
    assert report(project, "--sweep")[0].count('<img alt="') == 4
