"""The benchmarks run, at sizes too small to measure anything."""

import importlib
import io
import json
import math
import sys
import tarfile
from dataclasses import replace

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline import memory
from pipeline.data.datasets import PreparedDataset
from pipeline.errors import PipelineError
from pipeline.feature_store import FeatureSet
from pipeline.progress import progress_bar
from pipeline.settings import config
from stages import prepare_data
from stages.extract_features import plan as planning
from stages.extract_features.extraction import Extraction
from stages.extract_features.run import load as load_extraction
from stages.train_fl import run
from tests.conftest import REPOSITORY, invoke, write_params
from tests.prepare_backbone.guides import write_corpus
from tests.train_fl import tiny_project


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module


def test_train_benchmark_skips_simulators_that_are_not_installed(benchmark, capsys):
    train = benchmark("train")
    job = benchmark("train_job").Job("small_cnn", 2, 2, 4, 2, 1, 4, 0.01, 0.9)
    found = train._simulators("title", job, "/bin/false")
    assert list(found) == ["local engine"] and found["local engine"]["num_rounds"] == 2
    printed = capsys.readouterr().out
    assert "flower (ray)   skipped: no output" in printed and "requirements.txt" in printed


def test_dvc_benchmark_runs_every_stage_once(benchmark):
    new, finished = benchmark("dvc_time").measure(4, 2)
    assert new > finished > 0


def test_first_round_is_timed_separately(benchmark):
    seconds = benchmark("train_job").seconds_per_round([10.0, 15.0, 16.0, 18.0])
    assert seconds == {"num_rounds": 3, "job_seconds": 8.0, "first_round_seconds": 5.0, "round_seconds": 1.5}


def test_states_benchmark_counts_the_files_of_a_checkpoint(benchmark, tmp_path):
    states = benchmark("states")
    found = states.set_up(tmp_path, 2)()
    numbers = sum(value.numel() for value in benchmark("train_job").Job("small_cnn", *[1] * 8).model().parameters())
    # the server's weights and control variate, and the two clients'; buffers and headers are a few kilobytes
    assert found["save_megabytes"] == pytest.approx(4 * 4e-6 * numbers, abs=0.03)
    assert list(found) == list(states.COLUMNS) and not list(tmp_path.glob("*.tmp"))


def test_reproduction_summary_holds_the_finished_runs_of_the_current_settings(benchmark, tmp_path):
    reproduction = benchmark("reproduction")
    sweep = {"sweep.methods": ["fedavg", "fedprox"], "sweep.partitions": ["iid"], "sweep.seeds": [0, 1]}
    project = tiny_project.make(tmp_path, train_fl__num_rounds=1, **sweep)
    with pytest.raises(PipelineError, match="No run of x is finished"):
        reproduction.summary_of("x", [({}, project)])
    accuracy = (run(project, "fedavg", "iid", 1) / "rounds.csv").read_text().splitlines()[1].split(",")[1]
    summary = reproduction.summary_of("x", [({}, project)])
    assert summary["experiments"][0]["accuracies"] == {"iid": {"fedavg": {1: pytest.approx(float(accuracy), abs=1e-6)}}}
    assert (summary["runs"], summary["num_rounds"]) == (1, 1)
    with pytest.raises(PipelineError, match="train_fl.num_rounds 1, but params.yaml has 2"):
        reproduction.summary_of("x", [({}, tiny_project.make(tmp_path, train_fl__num_rounds=2, **sweep))])


def test_reproduction_summary_is_extended_only_by_runs_that_agree_with_it(benchmark):
    reproduction = benchmark("reproduction")
    about = {"preset": "x", "num_rounds": 20, "hours": 1.5, "commits": ["a"], "hardware": ["cpu"], "torch": ["2"]}

    def summary(changes, accuracies, **other):
        own = {"changes": changes, "partitions": {name: name for name in accuracies}, "unguided": {}}
        own |= {"baseline": other.pop("baseline", "fedavg"), "accuracies": accuracies, "features": None}
        return {**about, "runs": 0, "experiments": [own], **other}

    earlier = summary({}, {"iid": {"fedavg": {"0": 0.4, "1": 0.5}, "moon": {"0": 0.3}}, "nid2": {"moon": {"0": 0.2}}})
    kept = reproduction.seeds_to_keep(earlier, {})
    assert kept == {("iid", "fedavg"): {1}, ("iid", "moon"): set(), ("nid2", "moon"): {0}}
    assert reproduction.seeds_to_keep(earlier, {"a.b": 1}) == reproduction.seeds_to_keep(None, {}) == {}
    added = summary({}, {"iid": {"fedavg": {0: 0.4, 2: 0.6}}}, commits=["b"], hours=1.0, baseline=None)
    result = reproduction.extended(earlier, added)
    (own,) = result["experiments"]
    assert own["accuracies"] == {
        "iid": {"fedavg": {"0": 0.4, "1": 0.5, "2": 0.6}, "moon": {"0": 0.3}},
        "nid2": {"moon": {"0": 0.2}},
    }
    assert list(own["accuracies"]["iid"]["fedavg"]) == ["0", "1", "2"] and own["baseline"] == "fedavg"
    assert (result["runs"], result["hours"], result["commits"]) == (5, 2.5, ["a", "b"])
    assert len(reproduction.extended(earlier, summary({"a.b": 1}, {"iid": {}}))["experiments"]) == 2
    with pytest.raises(PipelineError, match=r"fedavg on iid, seed 1: accuracy 0.51 here, and 0.5 in the existing"):
        reproduction.extended(earlier, summary({}, {"iid": {"fedavg": {1: 0.51}}}))
    elsewhere = reproduction.extended(earlier, summary({}, {"iid": {"fedavg": {1: 0.51, 2: 0.6}}}, hardware=["other"]))
    assert elsewhere["experiments"][0]["accuracies"]["iid"]["fedavg"] == {"0": 0.4, "1": 0.5, "2": 0.6}
    assert (elsewhere["hardware"], elsewhere["largest_difference"]) == (["cpu", "other"], 0.01)
    elsewhere["experiments"][0]["unguided"] = {"feddifrc": "fedavg"}
    with pytest.raises(
        PipelineError, match=r"feddifrc on iid, seed 1: fedavg, with which it is compared, was trained on"
    ):
        reproduction.extended(elsewhere, summary({}, {"iid": {"feddifrc": {1: 0.7}}}, hardware=["other"]))
    more = reproduction.extended(elsewhere, summary({}, {"iid": {"feddifrc": {7: 0.7}}}, hardware=["other"]))
    assert more["experiments"][0]["accuracies"]["iid"]["feddifrc"] == {"7": 0.7}
    with pytest.raises(PipelineError, match=r"accuracy 0.53 here, and 0.5 in the existing"):
        reproduction.extended(elsewhere, summary({}, {"iid": {"fedavg": {1: 0.53}}}))
    assert "cpu, other beside other work (runs repeated on another differ by at most 1.00 points)" in (
        benchmark("reproduction_pages").caption(elsewhere)
    )
    with pytest.raises(PipelineError, match=r"moon on nid2, seed 1: no seed of the existing summary was trained again"):
        reproduction.extended(earlier, summary({}, {"nid2": {"moon": {1: 0.3}}}))


def test_reproduction_summary_is_extended_by_some_methods_of_some_partitions(benchmark, tmp_path):
    reproduction = benchmark("reproduction")
    sweep = {"sweep.methods": ["fedavg", "fedprox"], "sweep.partitions": ["iid", "dir"], "sweep.seeds": [0]}
    project = tiny_project.make(tmp_path, train_fl__num_rounds=1, **sweep)
    for method, partition in (("fedavg", "iid"), ("fedprox", "iid")):
        run(project, method, partition, 0)
    earlier = json.loads(json.dumps(reproduction.summary_of("x", [({}, project)])))
    run(project, "fedprox", "dir", 0)
    result = reproduction.summary_of("x", [({}, project)], earlier)
    (tmp_path / "x.json").write_text(json.dumps(result))
    only_fedavg = tiny_project.make(tmp_path, train_fl__num_rounds=1, **sweep | {"sweep.methods": ["fedavg"]})
    with pytest.raises(PipelineError, match=r"x.json has 2 runs that are not among these. Use --extend to keep them"):
        reproduction._write("x", [reproduction.Experiment({}, tmp_path, only_fedavg)], False, tmp_path)
    (own,) = result["experiments"]
    assert {key: list(value) for key, value in own["accuracies"].items()} == {
        "iid": ["fedavg", "fedprox"],
        "dir": ["fedprox"],
    }
    assert (result["runs"], own["baseline"]) == (3, "fedavg") and result["hours"] >= earlier["hours"]


def test_reproduction_names_what_is_not_there(benchmark, tmp_path):
    words = ["train", "digits-table", "--work", str(tmp_path), "--summaries", str(tmp_path)]
    failed = CliRunner().invoke(benchmark("reproduction").main, [*words, "--method", "moo"])
    assert failed.exit_code == 1 and "digits-table has no method moo. Use one of fedavg, " in failed.output
    words = ["train", "nosuch", "--work", str(tmp_path), "--summaries", str(tmp_path)]
    assert CliRunner().invoke(benchmark("reproduction").main, words).exit_code == 1
    assert [file.name for file in tmp_path.iterdir()] == ["digits-table.yaml"]
    assert benchmark("reproduction")._earlier("digits-table", benchmark("reproduction_pages").SUMMARIES)["runs"] > 0
    with pytest.raises(PipelineError, match=r"x.json does not exist. Train without --extend"):
        benchmark("reproduction")._earlier("x", tmp_path)


def test_reproduction_pages_are_made_from_their_summaries(benchmark):
    done = CliRunner().invoke(benchmark("reproduction").main, ["pages", "--check"])
    assert done.exit_code == 0, done.output


def test_reproduction_pages_compare_seeds_that_both_methods_have(benchmark):
    pages = benchmark("reproduction_pages")
    gain = pages.gain_of({"0": 0.5, "1": 0.7, "2": 0.9}, {"1": 0.6, "2": 0.6, "5": 0.1})
    assert gain.by_seed == pytest.approx([0.1, 0.3]) and pages.gain_of({"0": 0.5}, {"1": 0.5}) is None
    half_width = 12.7062 * 0.1414214 / 2**0.5  # t of one degree of freedom; the deviation of 0.1 and 0.3
    assert gain.half_width == pytest.approx(half_width, rel=1e-4)
    surely = pages.gain_of({"0": 0.61, "1": 0.62, "2": 0.63}, {"0": 0.5, "1": 0.5, "2": 0.5})
    verdicts = [pages.verdict(gain, 2.0), pages.verdict(surely, 2.0), pages.verdict(surely, -2.0)]
    assert verdicts == ["cannot tell", "same sign", "other sign"]
    page = "before\n<!-- x -->\nold\n<!-- /x -->\nafter\n"
    assert pages.put(page, "x", "new") == "before\n<!-- x -->\nnew\n<!-- /x -->\nafter\n"
    with pytest.raises(PipelineError, match="has no marks"):
        pages.put(page, "y", "new")


def test_papers_gain_is_that_of_its_own_table(benchmark):
    paper = benchmark("paper_numbers")
    assert paper.gain("feddifrc", "fedavg", "nid1_005") == 4.87  # 83.14 - 78.27
    assert paper.gain("feddifrc", "layer3", "nid1_02") == 0.46  # 88.27 - 87.81
    assert paper.gain("feddifrc", "fednh", "nid2") is None


def test_guide_benchmark_trains_on_one_half_and_measures_on_the_other(benchmark, tmp_path):
    for split in ("train", "test"):
        write_corpus(tmp_path / "cifar10" / split, 8, seed=ord(split[1]))
    words = [str(tmp_path / "cifar10"), str(tmp_path / "out"), "--results", str(tmp_path / "results"), "--size", "nano",
             "--minutes", "0.01", "--batch-size", "4", "--device", "cpu", "--timesteps", "100"]  # fmt: skip
    result = CliRunner().invoke(benchmark("cifar_guide").main, words, catch_exceptions=False)
    found = json.loads((tmp_path / "results" / "result.json").read_text())
    assert result.output.splitlines()[-1] == json.dumps(found)
    assert found["images"] == {"public": 8, "private": 8} and found["denoiser"]["steps"] >= 1
    halves = [
        {file.read_bytes() for file in (tmp_path / "out" / name).rglob("*.png")} for name in ("public", "private")
    ]
    assert not halves[0] & halves[1] and len(halves[1]) == 8 + 16  # half of the training images, all test images
    assert set(found["private"]) == {"100"} and 0 <= found["private"]["100"]["probe"] <= 1
    archive = b"".join(part.read_bytes() for part in sorted((tmp_path / "results").glob("weights.tar.*")))
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert "model/unet/diffusion_pytorch_model.safetensors" in tar.getnames()


def test_inversion_benchmark_attacks_and_trains_on_what_is_shared(benchmark, tmp_path):
    inversion = benchmark("inversion")
    project = tiny_project.make(tmp_path, train_fl__num_rounds=1)
    tiny_project.add_features(project)
    found = inversion.measure(project, "iid", 2, ["as it is", "prompted only", "3 dims per layer", "noise 1"])
    # one layer of 6 dimensions, an image's denoised representation and those of 3 prompts
    numbers = {name: row["numbers"] for name, row in found["rows"].items()}
    assert numbers == {"as it is": 24, "prompted only": 18, "3 dims per layer": 12, "noise 1": 24}
    row = found["rows"]["as it is"]
    first, second = row["gains"]
    assert row["gain"] == pytest.approx((first + second) / 2)
    # Student's t with one degree of freedom is the Cauchy distribution, whose 97.5 % quantile is tan(0.475 pi)
    assert row["half_width"] == pytest.approx(math.tan(0.475 * math.pi) * abs(first - second) / 2)
    features = inversion.SharedSet(project.features_dir, inversion.CHANGES["class means only"])
    rows, means = features.read(np.array([5, 3])), FeatureSet(project.features_dir).read(np.arange(len(features)))
    assert not rows.denoised.any()
    np.testing.assert_allclose(rows.prompted[1], means.prompted.astype(float).mean(0), rtol=1e-3)
    assert np.array_equal(rows.prompted[0], rows.prompted[1])
    (row,) = inversion.measure(project, "iid", 0, ["class means only"])["rows"].values()
    # nothing tells the images apart, so one of the hidden half is guessed: the one nearest to the mean image
    assert (row["numbers"], row["identified"]) == (0, 1 / (len(features) - len(features) // 2))
    assert row["recognised"] == row["identified"] and found["rows"]["as it is"]["recognised"] == 1
    noisy = inversion.SharedSet(project.features_dir, inversion.CHANGES["noise 1"])
    assert np.array_equal(noisy.read(np.array([3, 5])).prompted[1], noisy.read(np.array([5])).prompted[0])


def test_linear_head_learns_from_features_whose_noise_no_training_image_has(benchmark, extracted, monkeypatch):
    linear_head = benchmark("linear_head")
    monkeypatch.setattr(linear_head, "RATES", (0.1,))
    made = config.load(extracted / "params.yaml", {"train_fl.num_rounds": 3})
    found = linear_head.measure(made, "iid", 1)
    ((accuracy,),) = found["accuracies"].values()
    assert accuracy > 0.3 and found["central"] > 0.3  # chance: 0.1
    plan, features = planning.make(made), FeatureSet(made.features_dir)
    values, labels = linear_head.held_out(plan, features)
    extraction = Extraction(load_extraction(plan).session, plan.dataset.load("test"), plan.settings)
    assert np.array_equal(labels, extraction.data.labels)
    with torch.inference_mode(), progress_bar(0, "", "") as bar:
        inputs = extraction.clean_inputs(np.arange(len(labels)))  # with the noise of the first training images
        other = extraction.pooled(inputs, features.basis().layers, bar)
    differences = np.abs(values.numpy() - (other - features.basis().mean) / features.basis().std)
    assert differences.max(1).min() > 0.01 and differences.mean() < 1  # other noise on the same images


def test_linear_head_names_what_is_missing(benchmark, project):
    (project / "data").unlink()
    result = CliRunner().invoke(benchmark("linear_head").main, ["--params", str(project / "params.yaml")])
    assert (
        result.exit_code == 1 and result.output.startswith("Error: ") and "Run `pipeline prepare-data`" in result.output
    )


def test_benchmark_of_sources_writes_what_prepare_data_reads(benchmark, tmp_path):
    benchmarked, hashes = benchmark("sources"), set()
    files = benchmarked._jpegs(8)[:3]
    for source, write in benchmarked.WRITERS.items():
        root = tmp_path / source
        root.mkdir()
        for split, count in (("train", 30), ("test", 10)):
            write(root / "in", split, files, count)
        settings = {"source": source, "path": str(root / "in"), "image_size": 8, "train_subset": None}
        write_params(root, {f"prepare_data.{key}": value for key, value in settings.items()})
        dataset = PreparedDataset(prepare_data.run(config.load(root / "params.yaml")))
        labels = dataset.load("train").labels.tolist()
        assert sorted(labels) == sorted([*range(10)] * 3) and (source == "folder" or labels == [*range(10)] * 3)
        hashes |= {dataset.hash} if source != "folder" else set()  # whose images are in the order of their classes
    assert len(hashes) == 1


def test_images_benchmark_trains_from_the_map(benchmark, tmp_path):
    scale_images = benchmark("scale_images")
    scale_images.write_images(tmp_path, 4)
    (one_round,) = scale_images.train_from_map(tmp_path, 4)()
    assert one_round.num_samples == 4


@pytest.mark.usefixtures("quick_dry_runs")
def test_plan_compares_dry_runs_with_runs(benchmark, tmp_path, monkeypatch):
    plan = benchmark("plan")
    monkeypatch.setattr(plan, "CLASSES", 3)
    monkeypatch.setattr(plan, "PARTITION", "iid")  # so few classes do not give ten clients ten samples each
    monkeypatch.setattr(plan, "_succeed", lambda root, *words: plan.Run(invoke(root, *words).output.strip(), 2.0, 5, 7))
    flags = ["--images=100", "--images=200", "--measure=100", "--rounds=1", f"--work={tmp_path}"]
    done = CliRunner().invoke(plan.main, flags, catch_exceptions=False)
    found = json.loads(done.output.splitlines()[-1])["images"]
    extraction, training = found["100"]["extract-features"], found["100"]["train-fl"]
    assert extraction["passes"] == {"predicted": 300, "measured": 300} and extraction["time"]["measured"] == 2
    # measured are also the manifest and the figure of the basis
    assert 0.8 < extraction["disk"]["predicted"] / extraction["disk"]["measured"] < 1
    assert training["sent"]["measured"] == pytest.approx(training["sent"]["predicted"], rel=0.01)
    assert training["guidance"]["predicted"] == pytest.approx(100 * (144 * 4 * 3 + 8), rel=0.01)
    assert found["200"]["extract-features"]["passes"] == {"predicted": 600}
    assert any(
        line.startswith("passes        4 per image") for line in found["200"]["dry runs"]["8 processes, all prompts"]
    )
    assert "extract-features    passes                      300         300    1.00\n" in done.output
    assert not list(tmp_path.iterdir())


def test_plan_watches_a_command_until_its_last_line(benchmark, tmp_path):
    plan = benchmark("plan")
    code = """
import multiprocessing, time
def child(ready):
    taken, files = b"x" * 150_000_000, [open("/dev/null") for _ in range(20)]
    ready.set()
    time.sleep(1)
forked = multiprocessing.get_context("fork")
ready = forked.Event()
forked.Process(target=child, args=(ready,)).start()
ready.wait()
time.sleep(0.5)
print("done", flush=True)
time.sleep(0.5)
later, files = b"x" * 400_000_000, [open("/dev/null") for _ in range(50)]
time.sleep(0.2)
"""
    found = plan.watched([sys.executable, "-c", code], tmp_path)
    assert found.output == "done" and found.seconds > 1
    assert 150_000_000 < found.memory < 400_000_000 and 23 <= found.descriptors < 50
    with pytest.raises(click.ClickException, match="failed.\nwrong"):
        plan.watched([sys.executable, "-c", "raise SystemExit('wrong')"], tmp_path)


@pytest.mark.parametrize("name", ["partition", "statistics", "pictures", "report"])
def test_growth_with_clients_is_measured(benchmark, tmp_path, name):
    benchmark("scale").MEASUREMENTS[name].set_up(tmp_path, 4)()


def test_every_table_preset_has_a_place_on_the_reproduction_page():
    page = (REPOSITORY / "docs" / "reproduction.md").read_text()
    for name in (file.stem for file in (REPOSITORY / "presets").glob("*-*.yaml")):
        assert f"`{name}`" in page


def test_gpu_check_runs_on_a_cpu(benchmark, tmp_path):
    gpu_check = benchmark("gpu_check")
    output = tmp_path / "gpu.txt"
    only = [f"--only={name}" for name in gpu_check.CHECKS if name != "resume"]  # the only one that starts processes
    done = CliRunner().invoke(gpu_check.main, ["--device=cpu", f"--output={output}", *only])
    assert done.exit_code == 0, done.output
    text = output.read_text()
    *_, numbers = text.splitlines()
    assert list(json.loads(numbers)) == [name for name in gpu_check.CHECKS if name != "resume"]
    assert "WRONG" not in text and "FAILED" not in text


@pytest.mark.skipif(memory.anonymous() is None, reason="the system does not report memory without files")
def test_memory_of_a_federations_server_does_not_grow_with_its_participants(benchmark):
    """In memory, the replies of 128 participants would be 180 MB; 16 of them and the server's own may be."""
    assert benchmark("scale")._in_child("replies", 128, None)["megabytes"] < 60


def test_scale_measures_growth_and_compares_it_with_bounds(benchmark, tmp_path, monkeypatch, quick_python):
    scale = benchmark("scale")
    monkeypatch.setattr(sys, "executable", quick_python)
    done = CliRunner().invoke(scale.main, ["--tiny", "--only=import", f"--folder={tmp_path}"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output.splitlines()[-1])["measurements"]["import"]
    assert found["sizes"] == [2, 4, 8] and all(row["files"] > 3 for row in found["measured"])
    assert not list(tmp_path.iterdir())
    # 20, 80 and 320 MB for 2, 4 and 8 rows: quadratic; the seconds are below what counts, the files constant
    rows = {size: {"seconds": 0.001, "megabytes": 5.0 * size**2, "files": 20} for size in (2, 4, 8)}
    monkeypatch.setattr(scale, "_in_child", lambda name, size, folder: rows[size])
    measurement = replace(scale.MEASUREMENTS["import"], sizes=(2, 4, 8))
    monkeypatch.setitem(scale.MEASUREMENTS, "import", measurement)
    done = CliRunner().invoke(scale.main, ["--only=import"])
    assert done.exit_code == 1 and "Grows faster than its bound: import: megabytes.\n" in done.output
    *_, numbers, _ = done.output.splitlines()
    exponents = json.loads(numbers)["measurements"]["import"]["exponents"]
    assert exponents == {"seconds": 0.0, "megabytes": 2.0, "files": 0.0}


@pytest.mark.parametrize("file", sorted((REPOSITORY / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_benchmarks_that_read_params_register_the_methods(file):
    code = file.read_text()  # each runs alone, so no other module's import helps
    assert (
        "config.load(" not in code or "stages.train_fl.methods" in code or "from stages.train_fl import methods" in code
    )
