"""The runs of the sweep as their folders tell them, and the statistics over seeds that papers quote.

Accuracy is always the mean of the last five rounds' held-out accuracy (of all rounds, where there are fewer); the
deviation is the sample standard deviation over seeds, and there is none for one seed.
"""

import csv
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import provenance, run_digests
from pipeline.errors import PipelineError
from pipeline.settings.config import Config

TIME_PARTS = ("load", "train", "aggregate", "evaluate")


@dataclass(frozen=True)
class Run:
    """One finished run."""

    name: str
    method: str
    partition: str
    seed: int
    metrics: dict[str, Any]
    config: dict[str, Any]
    class_names: list[str]
    label_counts: np.ndarray  # int64 (num_clients, num_classes)
    heterogeneity: dict[str, float | None]
    client_accuracy: np.ndarray  # (num_clients,), held out; nan where a client's classes are not held out
    accuracy: np.ndarray  # (num_rounds,)
    loss: np.ndarray  # (num_rounds,)

    @property
    def judged_by_neighbours(self) -> bool:
        """Its accuracy is a k-NN classifier's on embeddings: it was trained without labels."""
        return "knn_neighbours" in self.config["method"]


@dataclass(frozen=True)
class Results:
    """All runs of the sweep, by partition and method, in the order of the seeds; and runs that it does not name."""

    methods: list[str]
    partitions: list[str]
    seeds: list[int]
    runs: dict[tuple[str, str], list[Run]]
    others: list[str]

    @property
    def labels(self) -> dict[str, str]:
        """Partition -> what it is called in tables and pictures: as papers do, or its name where that is not clear."""
        said = {name: _label(self.runs[name, self.methods[0]][0].config["partition"]) for name in self.partitions}
        return {name: label if list(said.values()).count(label) == 1 else name for name, label in said.items()}

    @property
    def baseline(self) -> str | None:
        """The method that gains are counted from: plain FedAvg, if the sweep has it."""
        for method in self.methods:
            settings = self.runs[self.partitions[0], method][0].config["method"]
            if settings["algorithm"] == "fedavg" and not settings.get("guidance"):
                return method
        return None

    @property
    def all_runs(self) -> list[Run]:
        """Every run of the sweep."""
        return [run for group in self.runs.values() for run in group]

    def measured_like(self, method: str) -> list[str]:
        """The methods whose accuracies compare with its: a classifier's own, or a k-NN classifier's."""
        first = {name: self.runs[self.partitions[0], name][0] for name in self.methods}
        return [name for name in first if first[name].judged_by_neighbours == first[method].judged_by_neighbours]

    def accuracies(self, partition: str, method: str) -> list[float]:
        """One a seed."""
        return [run.metrics["mean_last5_accuracy"] for run in self.runs[partition, method]]

    def mean_accuracies(self, method: str) -> list[float]:
        """The mean over partitions, one a seed."""
        by_partition = [self.accuracies(partition, method) for partition in self.partitions]
        return [statistics.fmean(of_seed) for of_seed in zip(*by_partition, strict=True)]

    def rounds_to(self, partition: str, method: str, target: float) -> list[float]:
        """Per seed the first round whose accuracy is at least `target`, counted from 1; infinity if none is."""
        return [_first_at_least(run.accuracy, target) for run in self.runs[partition, method]]

    def seconds(self, method: str) -> dict[str, float]:
        """Mean seconds a run, by part."""
        runs = [run for partition in self.partitions for run in self.runs[partition, method]]
        return {part: float(np.mean([run.metrics["seconds"][part] for run in runs])) for part in TIME_PARTS}


_READ = ("config.json", "partition.json", "rounds.csv", "clients.csv", "metrics.json", "details.json")
_CHECKED_WHERE_PRESENT = ("timing.csv", "partition.svg", "model.safetensors")  # not read, and not pulled by everyone


def read(config: Config) -> Results:
    """Reads every run that the sweep in params.yaml names.

    Raises:
        PipelineError: a run is missing, unreadable or was made with other settings.
    """
    named = config.params.sweep
    runs = {
        (partition, method): [_read(config, method, partition, seed) for seed in named.seeds]
        for partition in named.partitions
        for method in named.methods
    }
    for group in runs.values():
        if len({len(run.accuracy) for run in group}) > 1:
            raise PipelineError(f"the seeds of {group[0].name} have different numbers of rounds: train them again")
    _check_one_origin([run for group in runs.values() for run in group])
    present = sorted(file.parent.name for file in config.results_dir.glob("*/config.json"))
    of_sweep = {run.name for run in config.runs_of_sweep}
    others = [name for name in present if name not in of_sweep]
    return Results(named.methods, named.partitions, named.seeds, runs, others)


def _check_one_origin(runs: Iterable[Run]) -> None:
    """All runs were made from one data set, and those that are guided from one feature set."""
    for origin in ("dataset", "features"):
        found = {json.dumps(run.config[origin]): run.name for run in runs if run.config[origin]}
        if len(found) > 1:
            one, other = list(found.values())[:2]
            raise PipelineError(f"{one} and {other} were made from another {origin} each: run `dvc repro`")


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _read(config: Config, method: str, partition: str, seed: int) -> Run:
    folder = config.run_dir(method, partition, seed)
    try:
        present = [name for name in _CHECKED_WHERE_PRESENT if (folder / name).exists()]
        if changed := provenance.changed_file(folder, [*_READ, *present]):
            raise PipelineError(f"{folder / changed} is not what the run wrote: train it again, or `dvc checkout` it")
        run_digests.check(config, folder)
        settings = _json(folder / "config.json")
        config.check_settings_of_run(folder, settings, method, partition)
        deal = _json(folder / "partition.json")
        rounds = _rows(folder / "rounds.csv")
        return Run(
            name=folder.name,
            method=method,
            partition=partition,
            seed=seed,
            metrics=_json(folder / "metrics.json") | _json(folder / "details.json"),
            config=settings,
            class_names=deal["class_names"],
            label_counts=np.array(deal["label_counts"]),
            heterogeneity=deal["heterogeneity"],
            client_accuracy=np.array([_number(row["held_out_accuracy"]) for row in _rows(folder / "clients.csv")]),
            accuracy=np.array([float(row["accuracy"]) for row in rounds]),
            loss=np.array([float(row["loss"]) for row in rounds]),
        )
    except FileNotFoundError as error:
        raise PipelineError(
            f"{error.filename} is missing: run `pipeline train-fl --method {method} --partition {partition} "
            f"--seed {seed}`, or take the run out of sweep in params.yaml"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{folder} does not hold a whole run ({error!r}): train it again") from None


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _first_at_least(values: np.ndarray, target: float) -> float:
    reached = np.flatnonzero(values >= target)
    return float(reached[0]) + 1 if len(reached) else math.inf


def _label(partition: dict[str, Any]) -> str:
    """A partition by its settings, as papers head a column."""
    match partition:
        case {"kind": "dirichlet", "alpha": alpha}:
            return f"Dirichlet {alpha:g}"
        case {"kind": "dirichlet-balanced", "alpha": alpha}:
            return f"balanced Dirichlet {alpha:g}"
        case {"kind": "label-skew"}:
            return "label skew"
        case {"kind": "iid"}:
            return "IID"
        case {"kind": "classes-per-client", "num_classes_each": count}:
            return f"{count} classes each"
        case _:
            return str(partition["name"])
