"""Time one job on the local engine, on Flower SuperNodes over loopback, and in Flower's Ray simulation.

The job is FedDifRC on handwritten digits with all clients in every round. For each engine, the benchmark prints the
seconds of the job including start-up, of the first round, the median of later rounds, and the training time of the
slowest node per round. The engines' weights must be identical. Needs the results of the first three stages, as after
`dvc repro`; the simulation is skipped if flwr[simulation] is not installed.

    python benchmarks/federation.py --rounds 6
"""

import csv
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from examples.federation.loopback import Loopback
from pipeline import provenance
from pipeline.errors import PipelineError

ROOT = Path(__file__).parents[1]
RUN = "feddifrc-dir05/s0"


@click.command()
@click.option("--rounds", default=6, show_default=True)
@click.option("--clients", default=3, show_default=True)
@click.option("--epochs", default=5, show_default=True, help="Local epochs per round.")
def main(rounds: int, clients: int, epochs: int) -> None:
    """Measure and print."""
    settings = {
        "train_fl.num_clients": clients,
        "train_fl.clients_per_round": clients,
        "train_fl.num_rounds": rounds,
        "train_fl.local_epochs": epochs,
        "federation.min_clients": clients,
    }
    engines = {"local engine": _local, "SuperNodes": _nodes, "Ray simulation": _simulation}
    result: dict[str, Any] = {}
    click.echo(f"{'engine':16}{'job':>10}{'first round':>14}{'later round':>14}{'of it training':>16}")
    for name, measure in engines.items():
        if measure is _simulation and importlib.util.find_spec("ray") is None:
            click.echo(f"{name:16}skipped: pip install 'flwr[simulation]'")
            continue
        with tempfile.TemporaryDirectory(prefix="federation-") as folder:
            server = Path(folder) / "server"
            server.mkdir()
            (server / "data").symlink_to(ROOT / "data")
            (server / "params.yaml").write_text((ROOT / "params.yaml").read_text())
            started = time.perf_counter()
            measure(Path(folder), server, settings)
            result[name] = _read(server / "results" / RUN, time.perf_counter() - started)
        row = result[name]
        times = "".join(f"{row[key]:>12.2f} s" for key in ("first_round_seconds", "round_seconds"))
        click.echo(f"{name:16}{row['job_seconds']:>8.1f} s{times}{row['training_seconds']:>14.2f} s")
    weights = {row.pop("weights") for row in result.values()}
    if len(weights) != 1:
        raise PipelineError("The engines' weights differ. Their times cannot be compared.")
    click.echo("weights: the same bytes under every engine")
    job = {"rounds": rounds, "clients": clients, "epochs": epochs, "flwr": metadata.version("flwr")}
    click.echo(json.dumps({"engines": result, "job": job, "provenance": provenance.describe()}))


def _local(folder: Path, server: Path, settings: dict[str, Any]) -> None:
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    run = ["train-fl", "--method", "feddifrc", "--partition", "dir05", "--seed", "0"]
    subprocess.run([sys.executable, "-m", "pipeline", "--quiet", *run, *sets], cwd=server, check=True)


def _nodes(folder: Path, server: Path, settings: dict[str, Any]) -> None:
    with Loopback(folder, ROOT) as federation:
        for client in range(settings["train_fl.num_clients"]):
            federation.start_node(client, server)
        _finish(federation, federation.run(settings, method="feddifrc", partition="dir05"))


def _simulation(folder: Path, server: Path, settings: dict[str, Any]) -> None:
    os.environ["RAY_DEDUP_LOGS"] = "0"
    with Loopback(folder, ROOT, simulated_nodes=settings["train_fl.num_clients"]) as federation:
        _finish(federation, federation.run(settings, method="feddifrc", partition="dir05", clients=str(server)))


def _finish(federation: Loopback, run_id: int) -> None:
    if federation.wait(run_id, 1800) != "finished:completed":
        raise PipelineError(federation.log(run_id))


def _read(results: Path, seconds: float) -> dict[str, Any]:
    """Return a run's seconds by the server's clock and by the nodes' clocks."""
    with (results / "timing.csv").open() as stream:
        rounds = [sum(float(value) for key, value in row.items() if key != "round") for row in csv.DictReader(stream)]
    training = _training(results)
    return {
        "job_seconds": seconds,
        "first_round_seconds": rounds[0],
        "round_seconds": statistics.median(rounds[1:]),
        "training_seconds": statistics.median(training[1:]),
        "weights": provenance.file_sha256(results / "model.safetensors"),
    }


def _training(results: Path) -> list[float]:
    """Return the training seconds of the slowest node per round; on the local engine, of all clients in sequence."""
    if not (results / "participation.csv").exists():
        with (results / "timing.csv").open() as stream:
            return [float(row["load"]) + float(row["train"]) for row in csv.DictReader(stream)]
    slowest: dict[int, float] = {}
    with (results / "participation.csv").open() as stream:
        for row in csv.DictReader(stream):
            number = int(row["round"])
            slowest[number] = max(slowest.get(number, 0.0), float(row["train_seconds"]))
    return list(slowest.values())


if __name__ == "__main__":
    main()
