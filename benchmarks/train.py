"""Compare the speed of training with other implementations, on one machine in one run.

steps       one worker's step of FedAvg on the local engine against a bare PyTorch loop of the same steps with one
            thread (same model, batches, optimiser), and FedDifRC's against FedAvg's, including the lookup of targets
formats     steps with channels first and last, with BatchNorm and GroupNorm, in float32 and bfloat16
workers     rounds of the local engine with one worker and with as many as cores; beside them the same clients in
            threads of one process, each with its own copy of the network
simulators  rounds of the local engine against Flower's Ray simulation and apple/pfl-research's simulator, all using the
            cores as they do by default; for the job including start-up, and for rounds after the first, with 8 clients
            that all take part, and with 100 small clients of which 10 do; simulators that are not installed are skipped
clients     rounds of SCAFFOLD with 10 of 100, 1,000 and 10,000 clients: seconds and memory must not grow

Measurements to compare alternate, and the result is the median of their ratios over the repeats, so that other
processes slow down both. Prints tables, then one JSON line.

    python benchmarks/train.py --peers /tmp/peers/bin/python
"""

import functools
import itertools
import json
import multiprocessing
import os
import queue
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn import functional
from train_job import Job, seconds_per_round

from pipeline import memory, provenance
from pipeline.data.datasets import PreparedDataset
from pipeline.errors import PipelineError
from pipeline.feature_store import FeatureSet
from pipeline.settings import config, params
from pipeline.settings.params import Runtime
from stages.train_fl import methods, models, rounds, session
from stages.train_fl.augmentation import to_model_range
from stages.train_fl.client_data import Batches, ClientData
from stages.train_fl.encoders import EncoderName, EncoderSettings
from stages.train_fl.engines import local, workers
from stages.train_fl.guidance import GuidanceSource, GuidanceTargets, prepare
from stages.train_fl.methods import Method
from stages.train_fl.models import FLModel

HERE = Path(__file__).parent
ROOT = HERE.parent
PROMPTS = 10
STEPS: dict[EncoderName, int] = {"small_cnn": 40, "resnet10": 2}  # per measurement: about as long for each network
SIMULATED = {
    "8 clients x 256 images, 8 a round": Job("small_cnn", 8, 8, 256, 6, 1, 64, 0.01, 0.9),
    "100 clients x 32 images, 10 a round": Job("small_cnn", 100, 10, 32, 20, 1, 32, 0.01, 0.9),
}


@click.command()
@click.option("--repeats", default=5, show_default=True, help="Measurements of each kind.")
@click.option("--peers", default=sys.executable, help="A Python with the requirements of benchmarks/requirements.txt.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(repeats: int, peers: str, device: str) -> None:
    """Measure and print."""
    memory.keep_freed()  # as every command does; _peer gives the same settings to the simulators
    session.prepare_torch(Runtime.model_validate(_runtime() | {"device": device}))
    result: dict[str, Any] = {"cores": workers.resolve("auto", "cpu"), "steps": {}, "workers": {}, "simulators": {}}
    result["formats"] = {}
    click.echo(f"{'per step':12}{'bare':>10}{'fedavg':>10}{'feddifrc':>10}{'fedavg/bare':>14}{'feddifrc/fedavg':>17}")
    for encoder, steps in STEPS.items():
        row = result["steps"][encoder] = _steps(encoder, steps, repeats, device)
        times = "".join(f"{1e3 * row[name]:>7.2f} ms" for name in ("bare", "fedavg", "feddifrc"))
        click.echo(f"{encoder:12}{times}{row['fedavg_over_bare']:>14.3f}{row['feddifrc_over_fedavg']:>17.3f}")
    click.echo(f"\n{'per step, channels':36}{'first':>10}{'last':>10}{'last/first':>14}")
    for encoder in ("resnet10", "mobilenet_v2"):
        for normalisation, precision in itertools.product(("batch", "group"), ("float32", "bfloat16")):
            name = f"{encoder}, {normalisation} norm, {precision}"
            settings = [EncoderSettings(encoder, normalisation, precision, is_last) for is_last in (False, True)]
            row = result["formats"][name] = _formats(*settings, min(repeats, 3), device)
            times = "".join(f"{1e3 * row[name]:>7.0f} ms" for name in ("first", "last"))
            click.echo(f"{name:36}{times}{row['last_over_first']:>14.3f}")
    result["cache"] = _cache_reading()
    if device == "cpu":
        count = result["cores"]
        click.echo(
            f"\n{'per round':12}{'1 worker':>12}{f'{count} workers':>12}{'speed-up':>10}{'threads':>12}{'speed-up':>10}"
        )
        for encoder, steps in STEPS.items():
            row = result["workers"][encoder] = _workers(encoder, steps, repeats, count)
            click.echo(
                f"{encoder:12}{row['one']:>10.3f} s{row['processes']:>10.3f} s{row['processes_speed_up']:>9.2f}x"
                f"{row['threads']:>10.3f} s{row['threads_speed_up']:>9.2f}x"
            )
    for name, job in SIMULATED.items():
        result["simulators"][name] = _simulators(name, job, peers)
    result["clients"] = _clients()
    provenance_of = provenance.describe(device if device != "cpu" else None)
    click.echo(json.dumps(result | {"provenance": provenance_of}))


def _runtime() -> dict[str, Any]:
    return config.load(ROOT / "params.yaml").params.runtime.model_dump()


def _steps(encoder: EncoderName, steps: int, repeats: int, device: str) -> dict[str, float]:
    """Return seconds per step of each kind, and the median ratios."""
    job = Job(encoder, 1, 1, 64 * steps, 1, 1, 64, 0.01, 0.9)
    images, labels = job.client(0)
    data = ClientData(images, labels).to(device)
    section = config.load(ROOT / "params.yaml").settings("methods", "feddifrc")
    assert isinstance(section, params.Guidance)
    guided = ClientData(images, labels, _targets(section, len(labels), job.model().embedding_dim, labels)).to(device)
    fedavg = methods.build(methods.FedAvg.Settings(), job.model().to(device), 0.9, 0.0, 1)
    guidance = methods.build(section, job.model().to(device), 0.9, 0.0, 1)
    bare_model = job.model().to(device)
    kinds: dict[str, Callable[[], None]] = {
        "bare": lambda: _bare(bare_model, data, job),
        "fedavg": lambda: _engine(fedavg, [data], job, device),
        "feddifrc": lambda: _engine(guidance, [guided], job, device),
    }
    seconds = _alternating(kinds, repeats, device)
    ratio = {
        f"{above}_over_{below}": statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
        for above, below in (("fedavg", "bare"), ("feddifrc", "fedavg"))
    }
    return {name: statistics.median(values) / steps for name, values in seconds.items()} | ratio


def _formats(first: EncoderSettings, last: EncoderSettings, repeats: int, device: str) -> dict[str, float]:
    """Return seconds per step of both memory formats, and the median ratio; float32 without TF32."""
    job = Job(first.name, 1, 1, 64, 1, 1, 64, 0.01, 0.9)
    data = ClientData(*job.client(0)).to(device)
    networks = {name: models.build(of, 10, 0).to(device) for name, of in (("first", first), ("last", last))}
    kinds = {name: functools.partial(_bare, network, data, job) for name, network in networks.items()}
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        seconds = _alternating(kinds, repeats, device)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    ratio = statistics.median(last / first for last, first in zip(seconds["last"], seconds["first"], strict=True))
    return {name: statistics.median(values) for name, values in seconds.items()} | {"last_over_first": ratio}


def _workers(encoder: EncoderName, steps: int, repeats: int, count: int) -> dict[str, float]:
    """Return seconds per round after the first, of 4 clients per worker, and the median speed-up over one worker."""
    num_clients, num_rounds = 4 * count, 4
    job = Job(encoder, num_clients, num_clients, 64 * max(1, steps // 4), num_rounds, 1, 64, 0.01, 0.9)
    clients = [ClientData(*job.client(k)) for k in range(num_clients)]
    method = methods.build(methods.FedAvg.Settings(), job.model(), 0.9, 0.0, num_clients)
    kinds: dict[str, Callable[[], Iterator[Any]]] = {
        "one": lambda: _rounds(method, clients, job, "cpu", 1),
        "processes": lambda: _rounds(method, clients, job, "cpu", count),
        "threads": lambda: _threads(clients, job, count),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(max(1, repeats // 3)):
        for name, run in kinds.items():
            seconds[name].append(seconds_per_round(_marks(run()))["round_seconds"])
    speed_up = {
        f"{kind}_speed_up": statistics.median(a / b for a, b in zip(seconds["one"], seconds[kind], strict=True))
        for kind in ("processes", "threads")
    }
    return {name: statistics.median(values) for name, values in seconds.items()} | speed_up


def _marks(done: Iterator[Any]) -> list[float]:
    """Return the time before the first round and after every round."""
    return [time.perf_counter(), *(time.perf_counter() for _ in done)]


def _threads(clients: list[ClientData], job: Job, count: int) -> Iterator[None]:
    """Train the job's rounds with a thread per worker, without aggregation."""
    free = queue.SimpleQueue[Method]()
    for _ in range(count):
        free.put(methods.build(methods.FedAvg.Settings(), job.model(), job.momentum, 0.0, len(clients)))
    weights = job.model().state_dict()

    def train(data: ClientData) -> None:
        method = free.get()
        batches = Batches(data, job.local_epochs, job.batch_size, "none", torch.Generator())
        method.client_update(weights, {}, {}, batches, job.learning_rate)
        free.put(method)

    with ThreadPoolExecutor(count) as pool:
        for _ in range(job.num_rounds):
            list(pool.map(train, clients))
            yield


def _alternating(kinds: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of every kind in every repeat, after one that warms up memory and kernels."""
    for run in kinds.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, run in kinds.items():
            started = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _bare(model: FLModel, data: ClientData, job: Job) -> None:
    """Train by the usual PyTorch loop: no engine, no method, no metrics."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), job.learning_rate, momentum=job.momentum, fused=True)
    order = torch.randperm(len(data)).to(data.labels.device)
    for index in order.split(job.batch_size):
        loss = functional.cross_entropy(model(to_model_range(data.images[index]))[1], data.labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def _engine(method: Method, clients: list[ClientData], job: Job, device: str) -> None:
    """Run the job's rounds on the local engine: sampling, training, aggregation."""
    list(_rounds(method, clients, job, device, 1))


def _rounds(
    method: Method, clients: list[ClientData], job: Job, device: str, num_workers: int
) -> Iterator[rounds.Round]:
    schedule = rounds.Schedule(
        job.num_rounds, job.clients_per_round, job.local_epochs, job.batch_size, job.learning_rate, 1.0, "none", 0
    )
    weights = {name: value.to(device) for name, value in job.model().state_dict().items()}
    start = rounds.begin(method, weights)
    return local.run(method, start, clients, schedule, device, num_workers)


def _targets(section: params.Guidance, count: int, dims: int, labels: torch.Tensor) -> GuidanceTargets:
    """Make targets from random features in the shards' type, prepared as by the stage."""
    generator = torch.Generator().manual_seed(0)
    cached = GuidanceTargets(
        torch.rand((count, dims), generator=generator).half(),
        torch.rand((count, PROMPTS, dims), generator=generator).half(),
        labels,
    )
    return prepare(cached, section, {"up_blocks.1": [0, dims]}, torch.full((dims,), 0.5), torch.ones(dims))


def _cache_reading() -> dict[str, float] | None:
    """Return the seconds per image that a run spends once, on reading and preparing the project's feature set."""
    project = config.load(ROOT / "params.yaml")
    section = project.settings("methods", "feddifrc")
    assert isinstance(section, params.Guidance)
    try:
        features, rows = FeatureSet(project.features_dir), PreparedDataset(project.dataset_dir).rows("train")
    except PipelineError as error:
        click.echo(f"reading the cache: skipped ({error})")
        return None
    started = time.perf_counter()
    GuidanceSource(features, section).read(torch.arange(rows).numpy())
    seconds = time.perf_counter() - started
    train = project.params.train_fl
    epochs = train.num_rounds * train.local_epochs * train.clients_per_round / train.num_clients
    click.echo(f"reading the cache: {1e6 * seconds / rows:.0f} us per image, once per run of {epochs:.0f} epochs")
    return {"seconds_per_image": seconds / rows, "epochs": epochs}


def _simulators(title: str, job: Job, peers: str) -> dict[str, Any]:
    found: dict[str, Any] = {"local engine": _local_rounds(job)}
    ours = found["local engine"]
    header = f"{'first round':>13}{'later rounds':>14}{'rounds/h':>10}{'job: we are':>13}{'later: we are':>15}"
    click.echo(f"\n{title}\n{'':14}{header}")
    _print_simulator("local engine", ours, ours)
    for name, script in (("flower (ray)", "train_flower.py"), ("pfl", "train_pfl.py")):
        answer = _peer(script, job, peers)
        if isinstance(answer, str):
            click.echo(f"{name:14} skipped: {answer}")
            continue
        ratios = {key: answer[f"{key}_seconds"] / ours[f"{key}_seconds"] for key in ("job", "round")}
        found[name] = answer | {"ratios": ratios}
        _print_simulator(name, answer, ours)
    return found


def _local_rounds(job: Job) -> dict[str, float]:
    """Run the job on the local engine, in this process and its workers."""
    clients = [ClientData(*job.client(k)) for k in range(job.num_clients)]
    method = methods.build(methods.FedAvg.Settings(), job.model(), job.momentum, 0.0, job.num_clients)
    return seconds_per_round(_marks(_rounds(method, clients, job, "cpu", workers.resolve("auto", "cpu"))))


def _peer(script: str, job: Job, python: str) -> dict[str, Any] | str:
    """Return the result that a script prints as JSON, or why it has none."""
    environment = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    environment |= {name: str(value) for name, value in memory.MALLOC.items()}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HERE)])
    command = [python, str(HERE / script), job.to_json()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return f"{reason} (see benchmarks/requirements.txt)"
    return json.loads(lines[-1])


def _print_simulator(name: str, times: dict[str, float], ours: dict[str, float]) -> None:
    job, later = (times[key] / ours[key] for key in ("job_seconds", "round_seconds"))
    per_hour = 3600 * times["num_rounds"] / times["job_seconds"]
    click.echo(
        f"{name:14}{times['first_round_seconds']:>11.2f} s{times['round_seconds']:>12.3f} s{per_hour:>10.0f}"
        f"{job:>12.2f}x{later:>14.2f}x"
    )


def _clients() -> dict[int, dict[str, float]]:
    """Return seconds per round and peak memory of 10 participants, by the number of all clients."""
    click.echo(f"\n{'clients':>8}{'later rounds':>14}{'peak memory':>13}")
    found = {}
    for num_clients in (100, 1000, 10000):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[num_clients] = row = pool.apply(_many_clients, (num_clients,))
        click.echo(f"{num_clients:>8}{row['round_seconds']:>12.3f} s{row['peak_bytes'] / 1e6:>10.0f} MB")
    return found


def _many_clients(num_clients: int) -> dict[str, float]:
    """Run SCAFFOLD, whose clients keep states, on clients that share the same images, so that data do not count."""
    memory.keep_freed()
    torch.set_num_threads(1)
    job = Job("small_cnn", num_clients, 10, 32, 20, 1, 32, 0.01, 0.9)
    clients = [ClientData(*job.client(0))] * num_clients
    method = methods.build(methods.Scaffold.Settings(), job.model(), job.momentum, 0.0, num_clients)
    times = seconds_per_round(_marks(_rounds(method, clients, job, "cpu", 1)))
    status = Path("/proc/self/status").read_text()  # getrusage's peak includes the process that started this one
    peak = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return times | {"peak_bytes": int(peak[1]) * 1024 if peak else 0}


if __name__ == "__main__":
    main()
