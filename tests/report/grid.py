"""Folders of finished runs with invented numbers, for reports on many runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import provenance
from pipeline.io import atomic
from pipeline.settings import config
from stages.train_fl.partitions import heterogeneity
from tests.conftest import write_params


def write_grid(
    root: Path,
    methods: list[str],
    partitions: list[str],
    seeds: list[int],
    num_rounds: int,
    num_clients: int = 10,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write a project whose sweep is finished, without its report; `changes` are further keys of params.yaml."""
    sweep = (changes or {}) | {"sweep.methods": methods, "sweep.partitions": partitions, "sweep.seeds": seeds}
    project = config.load(write_params(root, sweep))
    rng, software = np.random.default_rng(0), provenance.describe("cpu")
    for method in methods:
        for partition in partitions:
            for seed in seeds:
                _write_run(project, method, partition, seed, num_rounds, num_clients, rng, software)
    return root


def _write_run(
    project: config.Config,
    method: str,
    partition: str,
    seed: int,
    num_rounds: int,
    num_clients: int,
    rng: np.random.Generator,
    software: dict[str, Any],
) -> None:
    path = project.run_dir(method, partition, seed)
    path.mkdir(parents=True)
    accuracy = np.clip(np.linspace(0.1, rng.uniform(0.5, 0.95), num_rounds) + rng.normal(0, 0.02, num_rounds), 0, 1)
    rows = [{"round": n, "accuracy": value, "loss": 2 - value} for n, value in enumerate(accuracy.tolist(), start=1)]
    atomic.write_csv(path / "rounds.csv", rows)
    clients = [{"client": k, "num_samples": 30, "held_out_accuracy": float(rng.random())} for k in range(num_clients)]
    atomic.write_csv(path / "clients.csv", clients)
    counts = rng.integers(0, 40, (num_clients, 10))
    atomic.write_json(
        path / "partition.json",
        {
            "class_names": [f"class {k}" for k in range(10)],
            "label_counts": counts.tolist(),
            "synthetic_counts": np.zeros_like(counts).tolist(),
            "heterogeneity": heterogeneity(counts),
            "clients": [[] for _ in counts],
        },
    )
    metrics = {"mean_last5_accuracy": float(accuracy[-5:].mean()), "final_accuracy": float(accuracy[-1])}
    details = {
        "best_accuracy": float(accuracy.max()),
        "wall_seconds": 23.1,
        "samples_per_second": 100.0,
        "seconds": {"load": 1.0, "train": 20.0, "aggregate": 0.1, "evaluate": 2.0},
        "bytes_down": 10_000_000,
        "bytes_up": 20_000_000,
        "domain_accuracy": {"digits": float(accuracy[-1])},
    }
    (path / "metrics.json").write_text(json.dumps(metrics))
    (path / "details.json").write_text(json.dumps(details))
    settings = project.settings_of_run(method, partition) | {
        "seed": seed,
        "dataset": {"name": "digits", "hash": "0" * 64},
        "features": None,
        "provenance": software,
    }
    atomic.write_json(path / "config.json", settings)
    provenance.write_checksums(path)


def reseal(run: Path) -> None:
    """Write checksums that match a changed run."""
    provenance.write_checksums(run)
    (run.parents[1] / ".sweep" / f"{run.parent.name}.sha256").unlink(missing_ok=True)
