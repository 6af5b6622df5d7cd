"""The report's tables and their three forms, compared with numbers derived by hand."""

import json
import re
import shutil

import pytest

from pipeline.settings import config
from stages.report import formats, tables
from stages.report.run import read_sweep
from tests.conftest import invoke
from tests.report.grid import reseal, write_grid

CURVES = {  # mean of all rounds (fewer than five): 0.6 and 0.5 for FedAvg's seeds, 0.7 and 0.8 for FedProx's
    ("fedavg", 0): [0.4, 0.6, 0.8],
    ("fedavg", 1): [0.4, 0.5, 0.6],
    ("fedprox", 0): [0.5, 0.7, 0.9],
    ("fedprox", 1): [0.7, 0.8, 0.9],
}


@pytest.fixture(scope="module")
def project_once(tmp_path_factory):
    root = write_grid(tmp_path_factory.mktemp("grid"), ["fedavg", "fedprox"], ["dir05"], [0, 1], num_rounds=3)
    for (method, seed), curve in CURVES.items():
        run = root / "results" / f"{method}-dir05" / f"s{seed}"
        rows = "".join(f"{number},{value},1.0\n" for number, value in enumerate(curve, start=1))
        (run / "rounds.csv").write_text(f"round,accuracy,loss\n{rows}")
        metrics = json.loads((run / "metrics.json").read_text()) | {"mean_last5_accuracy": sum(curve) / 3}
        (run / "metrics.json").write_text(json.dumps(metrics))
        (run / "clients.csv").write_text("client,held_out_accuracy\n0,0.2\n1,0.6\n2,\n")
        reseal(run)
    return root


@pytest.fixture
def project(project_once, tmp_path):
    return shutil.copytree(project_once, tmp_path / "project")


def table(project, name):
    made = tables.make(read_sweep(config.load(project / "params.yaml")))
    return {table.name: table for table in made}[name]


def set_metric(project, method, name, of_seeds):
    for seed, value in enumerate(of_seeds):
        file = project / "results" / f"{method}-dir05" / f"s{seed}" / "metrics.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
        reseal(file.parent)


def page(project):
    assert invoke(project, "report").exit_code == 0
    return (project / "report" / "index.html").read_text()


def texts(table):
    return [[(cell.text, cell.remark) for cell in row[1:]] for row in table.rows]


def test_accuracy_table_has_gains_and_the_best(project):
    accuracy = table(project, "accuracy")
    assert texts(accuracy) == [
        [("55.00 ± 7.07", "")],
        [("75.00 ± 7.07", "+20.00 ± 127.06")],
    ]  # +10 and +30; t(1) = 12.706
    assert [row[1].best for row in accuracy.rows] == [False, True]
    assert "mean of all 3 rounds" in accuracy.note


GUIDED = {  # accuracies of seeds 0 to 2
    "fedavg": (0.5, 0.5, 0.5),
    "feddifrc": (0.6, 0.6, 0.9),
    "fedprox": (0.5, 0.6, 0.7),
    "fedprox-feddifrc": (0.52, 0.63, 0.74),
}


@pytest.fixture(scope="module")
def guided_once(tmp_path_factory):
    root = write_grid(tmp_path_factory.mktemp("grid"), list(GUIDED), ["dir02", "dir05"], [0, 1, 2], num_rounds=2)
    for method, reached in GUIDED.items():
        set_metric(root, method, "mean_last5_accuracy", reached)
    return root


@pytest.fixture
def guided(guided_once, tmp_path):
    return shutil.copytree(guided_once, tmp_path / "project")


def test_guidance_is_compared_with_the_same_method_without_it(guided):
    files = sorted(guided.glob("results/feddifrc-dir02/s*/metrics.json"))
    of_dir02 = [json.loads(file.read_text())["mean_last5_accuracy"] for file in files]
    assert of_dir02 != list(GUIDED["feddifrc"])  # set_metric changed dir05 only
    found = table(guided, "guidance")
    assert [row[0].text for row in found.rows] == ["feddifrc over fedavg", "fedprox-feddifrc over fedprox", "all"]
    column = found.header.index("Dirichlet 0.5")
    cells = [(row[column].text, row[column].remark, row[column].best) for row in found.rows]
    assert cells == [
        ("+20.00 ± 43.03", "3 of 3 seeds better", False),  # 10, 10, 40: deviation 17.32, times 4.3027 / sqrt(3)
        ("+3.00 ± 2.48*", "3 of 3 seeds better", True),
        ("6 of 6 better", "intervals: 1 above 0, 0 below, of 2", False),
    ]


def test_gain_by_guidance_is_on_the_page_and_in_the_summary(guided):
    assert "**+3.00 ± 2.48\\*** (3 of 3 seeds better)" in invoke(guided, "report", "--format", "markdown").output
    for form in ("markdown", "latex"):
        assert "fedprox-feddifrc over fedprox" in invoke(guided, "report", "--format", form).output
    text = page(guided)
    assert '<table id="table-guidance">' in text and 'href="#guidance"' in text
    summary = json.loads((guided / "report" / "summary.json").read_text())["dir05"]
    assert summary["fedprox-feddifrc"]["gain_over"] == "fedprox" and summary["fedprox"]["gain_over"] == "fedavg"
    assert summary["fedprox-feddifrc"]["gain"] == pytest.approx(0.03)
    assert summary["fedprox-feddifrc"]["accuracies"] == list(GUIDED["fedprox-feddifrc"])
    assert "gain" not in summary["fedavg"]


def test_a_guided_method_with_other_settings_is_no_pair(guided):
    for seed in range(3):
        for partition in ("dir02", "dir05"):
            file = guided / "results" / f"fedprox-{partition}" / f"s{seed}" / "config.json"
            settings = json.loads(file.read_text())
            settings["method"]["proximal_mu"] = 0.5
            file.write_text(json.dumps(settings))
            reseal(file.parent)
    found = read_sweep(config.load(guided / "params.yaml", {"methods.fedprox.proximal_mu": 0.5}))
    assert found.unguided == {"feddifrc": "fedavg"}


def test_runs_guided_by_a_backbone_that_saw_the_images_are_named(guided):
    for run in guided.glob("results/feddifrc-*/s*"):
        settings = json.loads((run / "config.json").read_text()) | {"seen_images": 7}
        (run / "config.json").write_text(json.dumps(settings))
        reseal(run)
    assert "an unfair advantage (feddifrc: 7)." in table(guided, "accuracy").note
    assert "advantage" not in table(guided, "guidance").note


def test_weights_of_the_guidance_are_named(guided, project_once):
    assert "Weights of TDCL and NDCR, which the paper sets to 1: feddifrc: 1 and 10" in table(guided, "accuracy").note
    assert "Weights" not in table(project_once, "accuracy").note


def test_methods_at_chance_are_named(project):
    assert "chance" not in table(project, "accuracy").note  # of ten classes
    set_metric(project, "fedavg", "mean_last5_accuracy", [0.09, 0.13])  # mean 0.11 = 1.1 / 10
    note = table(project, "accuracy").note
    assert "At most 1.1 times chance (1 of 10 classes) on Dirichlet 0.5: fedavg. A gain" in note
    set_metric(project, "fedavg", "mean_last5_accuracy", [0.09, 0.132])
    assert "chance" not in table(project, "accuracy").note


def test_intervals_are_explained(project):
    assert "more seeds make it narrower." in table(project, "accuracy").note
    one = tables.make(read_sweep(config.load(project / "params.yaml", {"sweep.seeds": [0]})))
    assert "interval" not in one[0].note


def test_comparing_variants_on_test_images_is_called_optimistic(tmp_path):
    def note(name, methods, **more):
        (tmp_path / name).mkdir()
        variant = {"methods.feddifrc-two": {"algorithm": "feddifrc", "ndcr_weight": 3.0}}
        changes = variant | {f"train_fl.{key}": value for key, value in more.items()}
        return table(write_grid(tmp_path / name, methods, ["dir05"], [0, 1], 3, changes=changes), "accuracy").note

    words = "the best one looks better than it is"
    assert words in note("both", ["feddifrc", "feddifrc-two"])
    assert words not in note("one", ["fedavg", "feddifrc", "fedprox-feddifrc"])
    assert words not in note("validation", ["feddifrc", "feddifrc-two"], evaluate_on="validation")


def test_runs_guided_by_features_with_noise_are_named(guided):
    assert "noise" not in table(guided, "accuracy").note
    for run in guided.glob("results/feddifrc-*/s*"):
        settings = json.loads((run / "config.json").read_text()) | {"feature_noise": 4.0}
        (run / "config.json").write_text(json.dumps(settings))
        reseal(run)
    assert "Guided by features with noise, in standard deviations (feddifrc: 4)." in table(guided, "accuracy").note


def test_equal_means_are_both_marked_best(project):
    set_metric(project, "fedavg", "mean_last5_accuracy", (0.7, 0.8))
    assert [row[1].best for row in table(project, "accuracy").rows] == [True, True]


def test_knn_accuracy_is_not_compared_with_model_accuracy(tmp_path):
    write_grid(tmp_path, ["fedavg", "fedprox", "simsiam"], ["dir05"], [0, 1], num_rounds=3)
    for method, accuracy in (("fedavg", 0.5), ("fedprox", 0.6), ("simsiam", 0.9)):
        set_metric(tmp_path, method, "mean_last5_accuracy", (accuracy, accuracy))
    accuracy, rounds = table(tmp_path, "accuracy"), table(tmp_path, "rounds")
    assert texts(accuracy)[1:] == [[("60.00 ± 0.00", "+10.00 ± 0.00*")], [("90.00 ± 0.00", "")]]
    assert [row[1].best for row in accuracy.rows] == [False, True, False]
    assert "(simsiam: k-NN classifier on the global model's embeddings" in accuracy.note
    assert texts(rounds)[2] == [("–", "")]


def test_linear_probe_table_exists_only_for_runs_without_labels(project):
    assert "probe" not in {table.name for table in tables.make(read_sweep(config.load(project / "params.yaml")))}
    set_metric(project, "fedprox", "linear_probe_accuracy", (0.8, 0.9))
    probe = table(project, "probe")
    assert texts(probe) == [[("–", "")], [("85.00 ± 7.07", "")]]
    assert not probe.rows[1][1].best  # the only one
    assert '<table id="table-probe">' in page(project)
    for form in ("markdown", "latex"):
        assert "85.00" in invoke(project, "report", "--format", form).output


def test_rounds_to_the_accuracy_of_the_baseline(project):
    # 0.55 is reached by FedAvg in rounds 2 and 3, by FedProx in rounds 2 and 1
    assert texts(table(project, "rounds")) == [[("2.5", "")], [("1.5", "")]]


def test_rounds_table_counts_seeds_that_never_reach_the_baseline(project):
    run = project / "results" / "fedprox-dir05" / "s1" / "rounds.csv"
    run.write_text("round,accuracy,loss\n1,0.1,1\n2,0.1,1\n3,0.1,1\n")
    reseal(run.parent)
    rounds = table(project, "rounds")
    assert texts(rounds)[1] == [("> 3", "1 of 2 seeds")]  # the median of 2 and never
    assert rounds.rows[1][1].value > rounds.rows[0][1].value and rounds.lower_is_better


def test_clients_table_has_the_worst_client_and_the_spread(project):
    assert texts(table(project, "clients")) == 2 * [
        [("20.00", "σ 20.00")]
    ]  # 0.2 and 0.6; no class of the third client is held out


def test_markdown_and_latex_forms(project):
    markdown = invoke(project, "report", "--format", "markdown").output
    squeezed = re.sub(" +", " ", re.sub("--+", "---", markdown))  # without the padding of columns
    assert (
        "| method | Dirichlet 0.5 |\n|:---|---:|\n| fedavg | 55.00 ± 7.07 |\n"
        "| fedprox | **75.00 ± 7.07** (+20.00 ± 127.06) |" in squeezed
    )
    latex = invoke(project, "report", "--format", "latex").output
    assert "    fedprox & \\textbf{75.00 $\\pm$ 7.07} (+20.00 $\\pm$ 127.06) \\\\\n    \\bottomrule" in latex
    assert "accuracy, \\%" in latex and "\\caption{\\textbf{Accuracy.} Global model" in latex
    assert "{tabular}{lr}" in latex and "{tabular}{lrrlllll}" in latex  # text columns are left-aligned


def test_latex_escapes_special_characters():
    made = formats.Table(
        "x", "A_b", "50 % & more", ["~", "^"], [[formats.Cell("\\{}"), formats.Cell("$#", 1.0, best=True)]]
    )
    written = formats.to_latex(made)
    assert "\\textbf{A\\_b.} 50 \\% \\& more" in written and "\\textasciitilde{} & \\textasciicircum{} \\\\" in written
    assert "\\textbackslash{}\\{\\} & \\textbf{\\$\\#} \\\\" in written


def test_page_names_runs_outside_the_sweep(project):
    result = invoke(project, "report", "--set", "sweep.methods=[fedavg]")
    assert result.exit_code == 0
    page = (project / "report" / "index.html").read_text()
    assert "does not list them: fedprox-dir05-s0, fedprox-dir05-s1." in page


def test_equal_results_give_an_identical_page(project):
    invoke(project, "report")
    first = (project / "report" / "index.html").read_bytes()
    invoke(project, "report")
    assert (project / "report" / "index.html").read_bytes() == first
