"""Complete runs on a tiny project: their files, equal bytes, resuming after a kill, errors on one line."""

import csv
import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import provenance
from pipeline.errors import PipelineError
from stages.train_fl import records, rounds, run
from stages.train_fl.checkpoint import Checkpoint
from stages.train_fl.client_data import Batches, ClientData
from tests.train_fl import tiny_project

FILES = (
    "rounds.csv",
    "clients.csv",
    "partition.json",
    "partition.svg",
    "config.json",
    "model.safetensors",
)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


def equal(first: Path, second: Path) -> None:
    for file in FILES:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return run(tiny_project.make(tmp_path_factory.mktemp("undisturbed")), "fedavg", "dir", 0)


def test_files_of_a_run(undisturbed):
    rounds = rows(undisturbed / "rounds.csv")
    assert [row["round"] for row in rounds] == ["1", "2", "3", "4"]
    sent = sum(tensor.nbytes for tensor in _weights(undisturbed).values())
    assert all(int(row["bytes_up"]) == int(row["bytes_down"]) == 2 * sent for row in rounds)
    assert list(rows(undisturbed / "timing.csv")[0]) == ["round", "load", "train", "aggregate", "evaluate"]
    modes = {(undisturbed / name).stat().st_mode for name in ("rounds.csv", "model.safetensors")}
    assert len(modes) == 1  # all files of a run can be read by the same users
    partition = json.loads((undisturbed / "partition.json").read_text())
    assert sorted(sum(partition["clients"], [])) == list(range(48))
    metrics = json.loads((undisturbed / "metrics.json").read_text())
    assert metrics["final_accuracy"] == float(rounds[-1]["accuracy"])
    # each is a column of `dvc metrics show`
    assert set(metrics) == {"mean_last5_accuracy", "final_accuracy", "mean_domain_accuracy"}
    # the test set has as many images of each domain, so the mean over domains is the accuracy
    details = json.loads((undisturbed / "details.json").read_text())
    assert set(details["domain_accuracy"]) == {"left", "right"} and details["samples_per_second"] > 0
    assert details["best_accuracy"] == max(float(row["accuracy"]) for row in rounds)
    parts = ("load", "train", "aggregate", "evaluate")
    seconds = sum(float(row[part]) for row in rows(undisturbed / "timing.csv") for part in parts)
    assert details["wall_seconds"] == pytest.approx(seconds)
    assert metrics["mean_domain_accuracy"] == pytest.approx(metrics["final_accuracy"])


def test_finished_run_of_other_settings_is_not_overwritten(tmp_path):
    project = tiny_project.make(tmp_path, train_fl__num_rounds=1)
    path = run(project, "fedavg", "iid", 0)
    weights = (path / "model.safetensors").read_bytes()
    assert run(project, "fedavg", "iid", 0) == path  # the same settings: the same run again
    other = tiny_project.make(tmp_path, train_fl__num_rounds=2)
    with pytest.raises(
        PipelineError, match=r"finished run of other settings or data \(train_fl.num_rounds\)\. .*--overwrite"
    ):
        run(other, "fedavg", "iid", 0)
    assert (path / "model.safetensors").read_bytes() == weights
    run(other, "fedavg", "iid", 0, overwrite=True)
    assert len(rows(path / "rounds.csv")) == 2


def edit(run: Path, change) -> None:
    """Change config.json of a run, with checksums that match."""
    settings = json.loads((run / "config.json").read_text())
    change(settings)
    (run / "config.json").write_text(json.dumps(settings))
    provenance.write_checksums(run)


def damage(run: Path) -> None:
    file = run / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")


def shorten(run: Path, names: set[str]) -> None:
    """Take files out of the checksums of a run."""
    sums = run / provenance.CHECKSUMS
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if line.split()[1] not in names))


UNFIT = {
    "unfinished": lambda run: (run / provenance.CHECKSUMS).unlink(),
    "damaged": damage,
    "without a file": lambda run: (run / "clients.csv").unlink(),
    "with short checksums": lambda run: shorten(run, {"timing.csv", "partition.svg"}),
    "with checksums cut off": lambda run: (run / provenance.CHECKSUMS).write_text("f" * 64 + " "),
    "of other data": lambda run: edit(run, lambda found: found["dataset"].update(hash="0" * 64)),
    "with more settings": lambda run: edit(run, lambda found: found.update(federation={"differential_privacy": 1})),
}


def kept(caplog, tmp_path, change) -> bool:
    """Finish a run, change it, train it again, and return whether it was kept."""
    project = tiny_project.make(tmp_path, train_fl__num_rounds=1)
    path = run(project, "fedavg", "dir", 3)
    change(path)
    before = (path / "rounds.csv").stat().st_ino, (path / "config.json").read_bytes()
    with caplog.at_level("INFO"):
        assert run(project, "fedavg", "dir", 3, overwrite=True) == path
    assert not provenance.changed_file(path, ["config.json", "model.safetensors", "clients.csv", "timing.csv"])
    is_kept = before == ((path / "rounds.csv").stat().st_ino, (path / "config.json").read_bytes())
    assert is_kept == ("fedavg-dir-s3 is complete already" in caplog.text)
    assert not is_kept or f". To train it again, delete {path}." in caplog.text
    return is_kept


def test_finished_run_of_equal_settings_and_data_is_kept(caplog, tmp_path):
    def elsewhere(found):
        found["provenance"] |= {"commit": "another-dirty", "hardware": {}}

    assert kept(caplog, tmp_path, lambda run: edit(run, elsewhere))
    assert "made by other code or versions" not in caplog.text


OTHER_SOFTWARE = {
    "other code": lambda found: found["provenance"].update(code="0" * 64),
    "another torch": lambda found: found["provenance"]["packages"].update(torch="1.0"),
    "an earlier version, without the hash of the code": lambda found: found["provenance"].pop("code"),
    "unknown software": lambda found: found.pop("provenance"),
}


@pytest.mark.parametrize("change", OTHER_SOFTWARE)
def test_finished_run_of_other_software_is_kept_with_a_warning(caplog, tmp_path, change):
    assert kept(caplog, tmp_path, lambda run: edit(run, OTHER_SOFTWARE[change]))
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "is complete already, made by other code or versions." in warning.getMessage()


def test_means_are_those_of_finished_runs_of_equal_settings(tmp_path):
    project = tiny_project.make(tmp_path, train_fl__num_rounds=1, **{"sweep.seeds": [0, 1]})
    file = project.means_file("fedavg", "dir")
    runs = [run(project, "fedavg", "dir", seed) for seed in (0, 1)]
    found = [json.loads((one / "metrics.json").read_text())["mean_last5_accuracy"] for one in runs]
    records.write_means(file, runs)
    means = json.loads(file.read_text())
    assert means["mean_last5_accuracy"] == pytest.approx(sum(found) / 2) and means["num_seeds"] == 2
    assert means["std"] == pytest.approx(abs(found[0] - found[1]) / 2**0.5)
    edit(runs[1], lambda settings: settings["train_fl"].update(learning_rate=0.5))
    records.write_means(file, runs)
    assert not file.exists()
    edit(runs[1], lambda settings: settings["train_fl"].update(learning_rate=project.params.train_fl.learning_rate))
    for unreadable in (lambda metrics: metrics.write_text("{"), lambda metrics: metrics.unlink()):
        records.write_means(file, runs)
        assert file.exists()
        unreadable(runs[1] / "metrics.json")
        records.write_means(file, runs)
        assert not file.exists()
        (runs[1] / "metrics.json").write_bytes((runs[0] / "metrics.json").read_bytes())


@pytest.mark.parametrize("how", UNFIT)
def test_other_runs_are_trained_again(caplog, tmp_path, how):
    assert not kept(caplog, tmp_path, UNFIT[how])


def test_accuracy_by_client_counts_its_own_samples(undisturbed):
    clients = rows(undisturbed / "clients.csv")
    partition = json.loads((undisturbed / "partition.json").read_text())
    assert [int(row["num_samples"]) for row in clients] == [len(part) for part in partition["clients"]]
    for row in clients:
        right = float(row["train_accuracy"]) * int(row["num_samples"])
        assert right == pytest.approx(round(right))


def test_equal_seeds_give_equal_bytes_and_leave_no_checkpoint(undisturbed, tmp_path):
    project = tiny_project.make(tmp_path)
    equal(undisturbed, run(project, "fedavg", "dir", 0))
    assert not list((project.state_dir / "checkpoints").iterdir())


# the process kills itself: before it writes a client's state for a checkpoint, or the checkpoint itself, whose states
# are all there; after that and before the previous one, or its states, are removed; or in the round after a checkpoint
KILLED = """
import json, os, signal, sys
from tests.train_fl import tiny_project
from pathlib import Path
from stages.train_fl import run
from pipeline.io import resumable
from stages.train_fl import rounds

calls = 0

def dying(function, when):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def die(root, moment, number):
    if moment.startswith("saving"):
        resumable.save_file = dying(resumable.save_file, number)
    elif moment.startswith("discarding"):
        resumable.ResumableStore.discard = dying(resumable.ResumableStore.discard, number)
    else:
        rounds.client_batches = dying(rounds.client_batches, number)
    run(tiny_project.make(Path(root), runtime__workers=1), "scaffold", "dir", 0)

for root, moment, number in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        die(root, moment, number)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


# moment, call at which the process dies, rounds that the checkpoint has. Two clients train per round, so a checkpoint
# is three files, and two calls that discard: the one before, and its states
KILLS = [
    ("saving a state", 5, 1),
    ("saving the round", 6, 1),
    ("discarding the round", 3, 2),
    ("discarding states", 4, 2),
    ("training", 6, 2),
]


@pytest.fixture(scope="module")
def with_states(tmp_path_factory) -> Path:
    """An undisturbed run of a method whose clients have states."""
    return run(tiny_project.make(tmp_path_factory.mktemp("with_states")), "scaffold", "dir", 0)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, quick_python) -> dict[str, Path]:
    """Projects left by killed processes."""
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    roots = {moment: tmp_path_factory.mktemp(moment.replace(" ", "-")) for moment, _, _ in KILLS}
    kills = json.dumps([(str(roots[moment]), moment, number) for moment, number, _ in KILLS])
    done = subprocess.run(
        [quick_python, "-c", KILLED, kills], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    assert list(map(int, done.stdout.split())) == [-signal.SIGKILL] * len(KILLS)
    return roots


@pytest.mark.parametrize("moment, found", [(moment, found) for moment, _, found in KILLS])
def test_killed_run_resumes_with_identical_results(with_states, killed, caplog, moment, found):
    project = tiny_project.make(killed[moment])
    with caplog.at_level("INFO"):
        resumed = run(project, "scaffold", "dir", 0)
    assert f"resuming after round {found} of 4" in caplog.text
    equal(with_states, resumed)


@pytest.mark.parametrize("method", ["scaffold", "fednova", "moon", "fednh", "fedcr", "feddyn", "fedavgm", "fedproto"])
def test_checkpoint_holds_every_state_of_a_method(tmp_path, caplog, method):
    paths = []
    for name in ("uninterrupted", "resumed"):
        (tmp_path / name).mkdir()
        workers = {"uninterrupted": 1, "resumed": 2}[name]  # a run may resume with another number
        project = tiny_project.make(tmp_path / name, train_fl__num_rounds=3, runtime__workers=workers)
        if name == "resumed":
            with pytest.raises(KeyboardInterrupt):
                _interrupt_after(project, num_rounds=2, method=method)
            project = tiny_project.make(tmp_path / name, train_fl__num_rounds=3, runtime__workers=1)
        with caplog.at_level("INFO"):
            paths.append(run(project, method, "dir", 0))
    assert "resuming after round 2 of 3" in caplog.text
    equal(*paths)


@pytest.mark.parametrize("damaged", ["round-*", "states/client-*"])
def test_damaged_checkpoint_is_logged_and_recomputed(with_states, tmp_path, caplog, damaged):
    project = tiny_project.make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        _interrupt_after(project, num_rounds=2, method="scaffold")
    file, *_ = (project.state_dir / "checkpoints").glob(f"*/{damaged}.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    equal(with_states, run(project, "scaffold", "dir", 0))
    assert "is damaged (its checksum does not match)" in caplog.text


def test_checkpoint_of_other_settings_is_not_used(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        _interrupt_after(tiny_project.make(tmp_path), num_rounds=2)
    with caplog.at_level("INFO"):
        run(tiny_project.make(tmp_path, train_fl__learning_rate=0.02), "fedavg", "dir", 0)
    assert "resuming" not in caplog.text


def test_checkpoint_outlives_a_commit(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(provenance, "git_commit", lambda: "a")
    with pytest.raises(KeyboardInterrupt):
        _interrupt_after(tiny_project.make(tmp_path), num_rounds=2)
    monkeypatch.setattr(provenance, "git_commit", lambda: "b")
    with caplog.at_level("INFO"):
        run(tiny_project.make(tmp_path), "fedavg", "dir", 0)
    assert "resuming after round 2 of 4" in caplog.text


def test_finished_run_removes_old_checkpoints_of_its_other_keys(tmp_path):
    folder = tiny_project.make(tmp_path).state_dir / "checkpoints"
    old, new, other = (folder / f"{name}-{key * 16}" for name, key in (("r-s0", "a"), ("r-s0", "b"), ("r-s01", "a")))
    for made in (old, new, other):
        made.mkdir(parents=True)
    for made in (old, other):
        os.utime(made, (0, 0))
    Checkpoint(folder / f"r-s0-{'c' * 16}").remove()
    assert sorted(folder.iterdir()) == [new, other]


def test_partition_that_does_not_fit_is_reported(tmp_path):
    project = tiny_project.make(tmp_path, partitions={"big": {"kind": "dirichlet", "alpha": 1.0, "min_samples": 13}})
    with pytest.raises(PipelineError, match=r"^partitions.big: 48 samples cannot give each of 4 clients 13. Lower"):
        run(project, "fedavg", "big", 0)


def test_divergence_names_round_and_client(tmp_path):
    project = tiny_project.make(tmp_path, train_fl__learning_rate=1e30)
    with pytest.raises(PipelineError, match=r"loss of client \d in round 1 is .*nan.*Lower train_fl.learning_rate"):
        run(project, "fedavg", "iid", 0)


def test_learning_rate_decays_once_per_round():
    schedule = rounds.Schedule(3, 1, 1, 1, 0.1, 0.5, "none", 0)
    assert [schedule.learning_rate_of(number) for number in (1, 2, 3)] == [0.1, 0.05, 0.025]


def test_a_client_with_one_image_and_an_empty_one(tmp_path):
    # 8x8 pixels end on a 1x1 map in a ResNet, where BatchNorm refuses a single image; domain 0 has 24 images
    partitions = {"odd": {"kind": "domain", "clients_per_domain": [3, 0], "samples_fraction": 0.05}}
    project = tiny_project.make(tmp_path, partitions=partitions, train_fl__model="resnet10", train_fl__num_rounds=1)
    assert [row["num_samples"] for row in rows(run(project, "fedavg", "odd", 0) / "clients.csv")] == ["1"] * 3

    clients = [
        ClientData(torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)) for n in (0, 2)
    ]
    schedule = rounds.Schedule(1, 2, 1, 1, 0.1, 1.0, "none", 0)
    assert rounds.sample_clients([1], schedule, 1) == [1]
    assert list(Batches(clients[0], 1, 4, "none", torch.Generator())) == []


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop-flip", "views"])
def test_batches_hold_every_sample_once_per_epoch(augmentation):
    labels = torch.arange(10)
    data = ClientData(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), labels)
    batches = Batches(data, 2, 4, augmentation, torch.Generator().manual_seed(0))
    drawn = list(batches)
    assert [len(batch.labels) for batch in drawn] == [4, 4, 2] * 2
    for epoch in (drawn[:3], drawn[3:]):
        assert sorted(torch.cat([batch.labels for batch in epoch]).tolist()) == list(range(10))
    assert all(batch.images.min() >= -1 and batch.images.max() <= 1 for batch in drawn)
    assert batches.loading.seconds > 0


def test_long_tail_comes_before_the_partition(tmp_path):
    project = tiny_project.make(tmp_path, train_fl__imbalance_factor=0.25, train_fl__num_rounds=1)
    counts = json.loads((run(project, "fedavg", "iid", 0) / "partition.json").read_text())["label_counts"]
    assert np.sum(counts, 0).tolist() == [16, 8, 4]  # 16 * 0.25^(c/2)


def _interrupt_after(project, num_rounds: int, method: str = "fedavg") -> None:
    """Press Ctrl-C in the middle of the round after `num_rounds`."""
    original, calls = rounds.check_finite, 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls > 2 * num_rounds:
            raise KeyboardInterrupt
        return original(*args)

    rounds.check_finite = interrupted
    try:
        run(project, method, "dir", 0)
    finally:
        rounds.check_finite = original


def _weights(path: Path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def test_full_disk_is_reported_on_one_line(tmp_path, quick_python):
    code = "import resource, pathlib, signal, torch; from stages.train_fl.records import write_weights; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += f"write_weights(pathlib.Path({str(tmp_path)!r}), {{'w': torch.zeros(10_000)}})"
    done = subprocess.run([quick_python, "-c", code], capture_output=True, text=True)
    assert "PipelineError" in done.stderr and "model.safetensors cannot be written" in done.stderr
    assert not list(tmp_path.iterdir())
