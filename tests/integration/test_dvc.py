"""The stages under DVC: what runs again, what does not, and what a killed extraction leaves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.data.datasets import PreparedDataset
from tests.conftest import REPOSITORY, write_params
from tests.integration.project import QUICK, copy_tracked
from tests.prepare_backbone import guides
from tests.prepare_backbone.guides import write_corpus

BIN = Path(sys.executable).parent
SWEEP = QUICK | {"sweep.methods": ["fedavg", "feddifrc"], "sweep.partitions": ["dir05"], "sweep.seeds": [0]}


@pytest.fixture(scope="module")
def root(tmp_path_factory, quick_bin) -> Path:
    """A project under DVC, without git, that has been run once; its venv is not activated, as after `make repro`."""
    root = tmp_path_factory.mktemp("dvc project")
    copy_tracked(root)
    write_params(root, SWEEP)
    (root / ".venv").mkdir()
    (root / ".venv" / "bin").symlink_to(quick_bin)
    config = root / ".dvc" / "config"
    config.write_text(config.read_text().replace("[core]\n", "[core]\n    no_scm = true\n"))
    dvc(root, "repro", "extract-features")
    assert ran(dvc(root, "repro", "--single-item", "train-fl")) == TRAINING  # which need no generated images
    assert not (root / "data" / "datasets" / "digits-synthetic").exists()
    assert ran(dvc(root, "repro")) == {"analyze-features", "synthesize", "report"}
    return root


TRAINING = {"train-fl@fedavg-dir05", "train-fl@feddifrc-dir05"}


def environment(root: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DVC_")}
    kept["PATH"] = os.pathsep.join(p for p in kept["PATH"].split(os.pathsep) if Path(p) != BIN)
    return kept | {"DVC_SITE_CACHE_DIR": str(root / ".dvc" / "site"), "DVC_NO_ANALYTICS": "1"}


def dvc(root: Path, *arguments: str, **more: str) -> str:
    """Run a DVC command with additional environment variables; it must succeed."""
    program = shutil.which("dvc", path=os.pathsep.join([str(root / ".venv" / "bin"), str(BIN)]))
    env = environment(root) | more
    done = subprocess.run([program, *arguments], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def pipeline(root: Path, *arguments: str) -> None:
    """A command by hand; it must succeed."""
    subprocess.run([root / ".venv" / "bin" / "pipeline", *arguments], cwd=root, check=True, capture_output=True)


def ran(output: str) -> set[str]:
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}


def test_unchanged_project_and_comments_run_nothing(root):
    with (root / "params.yaml").open("a") as stream:
        stream.write("# a comment\n")
    assert ran(dvc(root, "repro")) == set()


def test_runtime_settings_run_nothing(root):
    write_params(root, {**SWEEP, "runtime.unet_batch_size": 64})
    assert ran(dvc(root, "repro")) == set()


def test_training_parameter_runs_no_extraction_and_needs_no_weights(root):
    shutil.rmtree(root / "models")
    write_params(root, {**SWEEP, "train_fl.num_rounds": 3})
    assert ran(dvc(root, "repro")) == {*TRAINING, "report"}


def test_metrics_and_plots_are_declared(root):
    metrics = json.loads(dvc(root, "metrics", "show", "--json"))[""]["data"]
    runs = {f"results/{method}-dir05.json" for method in ("fedavg", "feddifrc")}
    assert set(metrics) == runs | {"analysis/features.json"}
    assert max(map(len, dvc(root, "metrics", "show").splitlines())) <= 100  # of a terminal
    plots = json.loads(dvc(root, "plots", "show", "--json"))["data"]["Accuracy per method"][0]
    assert {row["method"] for row in plots["content"]["data"]["values"]} == {"fedavg", "feddifrc"}
    assert len((root / "report" / "curves.csv").read_text().splitlines()) == 1 + 2 * 3


def test_report_depends_on_the_runs_of_the_sweep(root):
    def locked():
        lock = YAML(typ="safe").load((root / "dvc.lock").read_text(encoding="utf-8"))
        return {dep["path"]: dep.get("nfiles") for dep in lock["stages"]["report"]["deps"]}["results/.sweep"]

    write_params(root, SWEEP)
    dvc(root, "repro")
    assert locked() == 2
    pipeline(root, "train-fl", "--method", "fedprox", "--partition", "dir05", "--seed", "0")
    assert "up to date" in dvc(root, "status")
    write_params(root, SWEEP | {"sweep.methods": ["fedavg"]})
    assert ran(dvc(root, "repro")) == {"report"}
    assert locked() == 1 and "up to date" in dvc(root, "status")
    write_params(root, SWEEP)
    output = dvc(root, "repro")
    assert ran(output) == {"train-fl@feddifrc-dir05"}  # for its digest; that report is in DVC's cache
    assert "feddifrc-dir05-s0 is complete already" in output
    assert locked() == 2 and "up to date" in dvc(root, "status")


def test_a_new_seed_trains_only_its_run(root):
    def trained(output):
        """Stages that ran -> the runs that it trained, and those that it kept."""
        found = [re.findall(rf"(\S+){words}", output) for words in (": accuracy", " is complete already")]
        return sorted(ran(output)), *found

    changes = SWEEP | {"sweep.methods": ["fedavg"]}
    write_params(root, changes)
    dvc(root, "repro")
    digests = root / "results" / ".sweep" / "fedavg-dir05.sha256"
    for seeds, new, old in (([0, 11], [11], [0]), ([11, 10], [10], [11]), ([10], [], [10])):
        write_params(root, changes | {"sweep.seeds": seeds})
        names = [[f"fedavg-dir05-s{seed}" for seed in group] for group in (new, old)]
        assert trained(dvc(root, "repro")) == (["report", "train-fl@fedavg-dir05"], *names)
        assert [row.split()[1] for row in digests.read_text().splitlines()] == [f"s{seed}" for seed in sorted(seeds)]
        means = json.loads((root / "results" / "fedavg-dir05.json").read_text())
        assert means["num_seeds"] == len(seeds) and "up to date" in dvc(root, "status")
    assert (root / "results" / "fedavg-dir05" / "s0" / "SHA256SUMS").exists()  # a seed that left the sweep
    pipeline(root, "train-fl", "--method", "fedavg", "--partition", "dir05", "--seed", "12")
    kept = (["train-fl@fedavg-dir05"], [], ["fedavg-dir05-s10"])
    assert trained(dvc(root, "repro")) == kept  # its folder changed, and the report did not


def test_make_repro_trains_the_runs_in_parallel_and_stops_if_one_fails(root):
    def make(kl_weight):
        changes = {"sweep.methods": ["fedcr", "fedavg"], "sweep.seeds": [5], "train_fl.num_rounds": 1}
        write_params(root, SWEEP | changes | {"methods.fedcr": {"algorithm": "fedcr", "kl_weight": kl_weight}})
        command = ["make", "repro", "JOBS=2"]
        return subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True)

    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, root)
    (root / ".venv" / ".installed").touch()
    fedavg, fedcr = (f"train-fl@{method}-dir05" for method in ("fedavg", "fedcr"))
    failed = make(1e39)  # beyond float32
    # `dvc repro` alone would stop at the first run; and it would run again what has failed.
    assert failed.returncode != 0 and ran(failed.stdout) == {fedavg, fedcr}, failed.stdout + failed.stderr
    assert failed.stdout.count(f"Running stage '{fedcr}'") == 1
    assert "Error: training diverged" in failed.stderr and f"failed to reproduce '{fedcr}'" in failed.stderr
    done = make(0.001)
    assert done.returncode == 0 and ran(done.stdout) == {fedcr, "report"}, done.stdout + done.stderr
    lock = (root / "dvc.lock").read_bytes()
    assert {fedavg, fedcr} <= set(YAML(typ="safe").load(lock)["stages"])
    assert ran(dvc(root, "repro")) == set() and (root / "dvc.lock").read_bytes() == lock


def test_training_depends_on_generated_images(root):
    pipeline(root, "--quiet", "prepare-backbone")  # another test removed the weights
    changes = SWEEP | {"sweep.methods": ["fedavg"], "train_fl.balance_with_synthetic": "mean"}
    for count in (1, 2):
        generation = {"synthesize.images_per_class": count, "synthesize.num_inference_steps": 1}
        write_params(root, changes | generation)
        order = [line.split("'")[1] for line in dvc(root, "repro").splitlines() if line.startswith("Running stage")]
        assert order == ["synthesize", "train-fl@fedavg-dir05", "report"]
    generated = PreparedDataset(root / "data" / "datasets" / "digits-synthetic")
    for rule in ("mean", "largest"):
        assert (root / "data" / "synthetic" / rule).read_text() == f"digits-synthetic {generated.hash}\n"
    write_params(root, changes | {"train_fl.balance_with_synthetic": "none"})
    assert ran(dvc(root, "repro", "train-fl")) == {"train-fl@fedavg-dir05"}  # no generated images are made for it


def test_a_guide_depends_on_its_corpus(root):
    corpus = write_corpus(root / "data" / "corpus" / "mine")
    guide = guides.settings(corpus) | {"prepare_backbone.corpus": "data/corpus/mine"}
    write_params(root, SWEEP | guide)
    assert ran(dvc(root, "repro", "prepare-backbone")) == {"prepare-backbone"}
    assert ran(dvc(root, "repro", "prepare-backbone")) == set()
    write_corpus(corpus, per_class=4)
    assert ran(dvc(root, "repro", "prepare-backbone")) == {"prepare-backbone"}
    manifest = json.loads((root / "data" / "backbones" / "mine.json").read_text())
    assert manifest["training"]["images"] == {"blue box": 4, "red ball": 4}
    write_params(root, SWEEP | guide | {"prepare_backbone.training": guides.QUICK | {"seed": 1}})
    assert ran(dvc(root, "repro", "prepare-backbone")) == {"prepare-backbone"}
    write_params(root, SWEEP)
    assert ran(dvc(root, "repro", "prepare-backbone")) == set()  # without a corpus, it is in DVC's cache


def test_extraction_killed_under_dvc_resumes_on_the_next_repro(root):
    write_params(root, {**SWEEP, "extract_features.timestep": 200, "extract_features.rows_per_shard": 10})
    shutil.rmtree(root / "models", ignore_errors=True)  # not DVC's: the extraction says how to make them again
    installed = dict(args=[BIN / "dvc", "repro", "extract-features"], cwd=root, env=environment(root))
    done = subprocess.run(**installed, capture_output=True, text=True)
    assert done.returncode != 0 and "Run `pipeline prepare-backbone`" in done.stderr
    pipeline(root, "--quiet", "prepare-backbone")

    process = subprocess.Popen(
        **installed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    staging = root / ".pipeline" / "staging"
    while process.poll() is None and not list(staging.glob("*-10/shard-00002.h5")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    output = dvc(root, "repro", "extract-features")
    assert ran(output) == {"extract-features"}
    assert "resuming" in output
