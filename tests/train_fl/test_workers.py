"""Clients trained side by side in worker processes: equal bytes for any number of workers, errors, and their end."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError, PipelineError, TrainingDiverged
from pipeline.feature_store.schema import InvalidFeatureSet
from pipeline.io.system_errors import SystemRefusal
from pipeline.settings import params
from stages.train_fl import methods, models, rounds, run
from stages.train_fl.client_data import Batches, ClientData
from stages.train_fl.encoders import EncoderSettings
from stages.train_fl.engines import local, workers
from tests.train_fl import tiny_project
from tests.train_fl.method_fixtures import DIM, client, state_of

REPOSITORY = Path(__file__).parents[2]
CLIENTS = [client(size, seed) for seed, size in enumerate((5, 16, 9, 12))]


def train(settings, num_workers: int) -> list[rounds.Round]:
    """Run three rounds of three of the four clients, with the network that the method needs."""
    guidance_dim = DIM if methods.guidance_of(settings) else None
    parts = methods.method_class(settings).model_parts(settings)
    model = models.build(EncoderSettings("small_cnn", "batch", "float32", True), 3, 0, guidance_dim, **parts)
    method = methods.build(settings, model, 0.9, 0.01, len(CLIENTS))
    augmentation = "views" if methods.method_class(settings).needs_augmentation else "none"
    schedule = rounds.Schedule(3, 3, 1, 8, 0.05, 1.0, augmentation, 0)
    start = rounds.begin(method, state_of(model))
    return list(local.run(method, start, CLIENTS, schedule, "cpu", num_workers))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("algorithm", list(params.METHODS))
def test_results_are_identical_for_any_number_of_workers(algorithm):
    settings = params.METHODS[algorithm]()
    alone = train(settings, 1)
    for num_workers in (2, 4):
        for one, several in zip(alone, train(settings, num_workers), strict=True):
            assert one.train_metrics == several.train_metrics and one.participants == several.participants
            assert (one.bytes_up, one.bytes_down, one.num_samples) == (
                several.bytes_up,
                several.bytes_down,
                several.num_samples,
            )
            assert same(one.weights, several.weights)
            for part in ("weights", "broadcast", "private"):
                assert same(getattr(one.progress.server, part), getattr(several.progress.server, part))
            assert one.progress.state_rounds == several.progress.state_rounds


@pytest.mark.parametrize("method", ["fedavg", "simsiam"])
def test_files_of_a_run_are_identical_for_any_number_of_workers(tmp_path, method):
    files = {}
    for num_workers in (1, 3):
        (tmp_path / str(num_workers)).mkdir()
        project = tiny_project.make(
            tmp_path / str(num_workers),
            runtime__workers=num_workers,
            train_fl__clients_per_round=4,
            train_fl__num_rounds=2,
            train_fl__augmentation="views",
        )
        path = run(project, method, "dir", 0)
        names = ("rounds.csv", "clients.csv", "metrics.json", "model.safetensors", "config.json")
        files[num_workers] = [(path / name).read_bytes() for name in names]
    assert files[1] == files[3]


def test_workers_are_distinct_processes_with_one_thread():
    def report(shared, item):
        time.sleep(0.05)
        return shared, item, os.getpid(), torch.get_num_threads()

    with workers.opened(2, report) as compute:
        results = compute("first", [3, 1, 2]) + compute("second", [5])
    assert [result[:2] for result in results] == [("first", 3), ("first", 1), ("first", 2), ("second", 5)]
    pids = {result[2] for result in results}
    assert len(pids) == 2 and os.getpid() not in pids
    assert {result[3] for result in results} == {1}
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("memory", [1 << 20, 100, 1])  # all tensors fit into the shared memory, some do, none does
def test_tensors_of_every_kind_survive_the_transfer(memory):
    values = {
        "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "bool": torch.tensor([[True], [False]]),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "strided": torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "view": torch.arange(10.0)[2:4],
        "transposed": torch.arange(6.0).view(2, 3).T,
    }
    with workers.opened(2, lambda shared, item: {**shared, "item": item}, memory) as compute:
        (result,) = compute(values, [torch.ones(2)])
    assert result.pop("item").tolist() == [1, 1]
    assert all(result[name].dtype == value.dtype and torch.equal(result[name], value) for name, value in values.items())
    assert result["strided"].is_contiguous(memory_format=torch.channels_last)
    result["view"] += 1  # received tensors are writable


class OfTwo(Exception):  # cannot be pickled: its class needs two arguments
    def __init__(self, first, second):
        super().__init__(first + second)


@pytest.mark.parametrize(
    "error, kind, text",
    [
        (TrainingDiverged("of client 3"), TrainingDiverged, "of client 3"),
        (InvalidFeatureSet("a shard is damaged", "Get it again"), InvalidFeatureSet, None),
        (SystemRefusal(Path("train.h5"), "too many open files", "Close some"), SystemRefusal, None),
        (OfTwo("of client", " 3"), RuntimeError, "OfTwo in a training worker"),
        (ValueError("of client 3"), ValueError, "of client 3"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_error_of_a_worker_is_raised_here(error, kind, text):
    def fail(shared, item):
        raise error

    with pytest.raises(kind) as raised, workers.opened(2, fail) as compute:
        compute(None, [1, 2, 3])
    assert type(raised.value) is kind and str(raised.value) == (text or str(error))
    assert vars(raised.value).keys() >= vars(error).keys() or kind is RuntimeError
    assert not multiprocessing.active_children()


def test_result_that_cannot_be_sent_is_named():
    with pytest.raises(AttributeError, match="Can't pickle"), workers.opened(2, lambda *_: lambda: None) as compute:
        compute(None, [1])


def test_worker_that_cannot_be_started_is_one_line(monkeypatch):
    def refuse():
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    wanted = r"training worker 1 of 2 cannot be started \(.*\)\. Set runtime.workers to a lower number"
    with pytest.raises(PipelineError, match=wanted), workers.opened(2, lambda *_: None):
        pass


def test_worker_whose_parent_lets_go_of_it_ends_without_a_traceback(capfd):
    worker = workers._Worker(lambda *_: None, 1, [])
    worker.link.close()
    worker._process.join(10)
    assert worker._process.exitcode == 0 and capfd.readouterr() == ("", "")


def test_workers_can_be_stopped_at_once():
    for _ in range(10):
        with workers.opened(2, lambda *_: None):
            pass
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_a_round_ends_the_command_and_its_workers(tmp_path, number):
    tiny_project.make(tmp_path)
    command = [sys.executable, "-c", ROUND, str(tmp_path), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, start_new_session=True)
    assert done.returncode == 128 + number and "Traceback" not in done.stderr
    assert not [line for line in processes() if str(tmp_path) in line]


ROUND = """
import os, signal, sys
from pathlib import Path
from stages.train_fl import methods, rounds
from pipeline.cli.commands import main

root, number = Path(sys.argv[1]), int(sys.argv[2])
original = rounds.client_batches
parent = os.getpid()

def batches(*args):  # in a worker; the first one sends the signal
    try:
        (root / "sent").touch(exist_ok=False)
    except FileExistsError:
        signal.pause()
    os.killpg(os.getpgid(parent), number) if number == signal.SIGINT else os.kill(parent, number)
    signal.pause()

rounds.client_batches = batches
names = {"prepare_data.name": "tiny", "prepare_data.image_size": 8}
sets = [word for name, value in names.items() for word in ("--set", f"{name}={value}")]
os.chdir(root)
main(["train-fl", "--method", "fedavg", "--partition", "iid", "--seed", "0", "--set", "runtime.workers=2", *sets])
"""


def processes() -> list[str]:
    """The command lines of all processes."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_killed_worker_is_one_line():
    def die(shared, item):
        os.kill(os.getpid(), signal.SIGKILL)

    wanted = r"a training worker died \(killed by SIGKILL\)\. If memory ran out, set runtime.workers to a lower number"
    with pytest.raises(PipelineError, match=wanted), workers.opened(2, die) as compute:
        compute(None, [1])


ORPHANS = """
import os, sys, time
from stages.train_fl.engines import workers

def work(shared, item):
    print(os.getpid(), flush=True)
    time.sleep(60)

with workers.opened(2, work) as compute:
    compute(None, [1, 2])
"""


def test_workers_end_at_once_if_their_parent_is_killed():
    command = [sys.executable, "-c", ORPHANS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as parent:
        assert parent.stdout
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.01)


def test_auto_is_a_worker_per_core_that_the_process_may_use():
    cores = os.sched_getaffinity(0)
    assert workers.resolve("auto", "cpu") == len(cores)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert workers.resolve("auto", "cpu") == 1
    finally:
        os.sched_setaffinity(0, cores)
    assert workers.resolve(3, "cpu") == 3
    assert (workers.resolve("auto", "cuda:0"), workers.resolve(8, "cuda:0")) == (4, 8)


def test_system_without_fork_trains_in_turn(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert workers.resolve("auto", "cpu") == 1
    with pytest.raises(ConfigError, match="runtime.workers is 2, but this process can start none. Set it to auto"):
        workers.resolve(2, "cpu")


def test_images_need_not_be_square():
    images = torch.randint(256, (6, 3, 8, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = ClientData(images, torch.zeros(6, dtype=torch.int64))
    for augmentation in ("crop", "crop-flip", "views"):
        (batch,) = Batches(data, 1, 6, augmentation, torch.Generator().manual_seed(0))
        assert batch.images.shape == (6, 3, 8, 32)


class _Stream:
    """A stream of a GPU that is not there: work on it is done when it is queued."""

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def test_streams_give_results_in_order_and_each_function_runs_once_at_a_time(streams):
    running = [0, 0]

    def function(own):
        def compute(shared, item):
            running[own] += 1
            assert running[own] == 1
            time.sleep(0.01 * (3 - item % 3))
            running[own] -= 1
            return shared * item

        return compute

    with workers.on_streams([function(0), function(1)], "cuda") as compute:
        assert compute(10, range(6)) == [0, 10, 20, 30, 40, 50]
        assert compute(2, [4]) == [8]


def test_an_error_in_a_stream_is_raised_and_no_further_item_starts(streams):
    started = []

    def compute(shared, item):
        started.append(item)
        if item == 1:
            raise TrainingDiverged("the loss of item 1")
        time.sleep(0.05)

    with pytest.raises(TrainingDiverged, match="of item 1"), workers.on_streams([compute], "cuda") as compute_all:
        compute_all(None, range(20))
    assert len(started) <= 3
