"""Finished runs as Python objects, for the report and for notebooks; no params.yaml is needed.

    from stages.report import read_run, read_runs, summary

    run = read_run("results/feddifrc-dir05/s0")
    pandas.DataFrame(run.rounds).plot("round", "accuracy")
    print(summary(read_runs("results")))

A run's accuracy is the mean over its last five rounds, see `pipeline.accuracy`.
"""

import csv
import fnmatch
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from pipeline import accuracy, manifests, provenance
from pipeline.errors import DataError
from pipeline.io.system_errors import reading
from pipeline.manifests import RunConfig, run_name

log = logging.getLogger(__name__)

_FILES = ("config.json", "rounds.csv", "metrics.json", "details.json")
_OF_CLIENTS = ("partition.json", "clients.csv")  # only optional if the clients were nodes with images of their own
_OPTIONAL_FILES = ("timing.csv", "partition.svg", "model.safetensors")  # not read, and checked only if present

Row = dict[str, Any]


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run, as its folder holds it.

    If the clients were nodes with images of their own, `clients`, `label_counts` and `heterogeneity` are empty.

    Attributes:
        name: By its folder: "feddifrc-dir05-s0" in results/feddifrc-dir05/s0.
        settings: Settings, data and software of the run (config.json).
        metrics: Numbers of metrics.json and details.json, such as `best_accuracy` (from 0 to 1).
        rounds: One row per round (rounds.csv).
        clients: One row per client (clients.csv): the final global model's accuracy on the client's classes.
        class_names: One per class.
        label_counts: int64 (num_clients, num_classes), training samples.
        heterogeneity: Statistics of how far the clients' label distributions differ; docs/api.md defines each.
    """

    name: str
    settings: RunConfig
    metrics: dict[str, Any]
    rounds: list[Row]
    clients: list[Row]
    class_names: list[str]
    label_counts: np.ndarray
    heterogeneity: dict[str, float | None]

    @property
    def method(self) -> str:
        """Name of the method in params.yaml."""
        return self.settings.method["name"]

    @property
    def partition(self) -> str:
        """Name of the partition in params.yaml."""
        return self.settings.partition["name"]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.settings.seed

    @property
    def accuracy(self) -> np.ndarray:
        """float64 (num_rounds,), held-out accuracy from 0 to 1."""
        return np.array([row["accuracy"] for row in self.rounds], np.float64)

    @property
    def loss(self) -> np.ndarray:
        """float64 (num_rounds,), held-out loss."""
        return np.array([row["loss"] for row in self.rounds], np.float64)

    @property
    def client_accuracy(self) -> np.ndarray:
        """float64 (num_clients,), from 0 to 1; NaN for a client none of whose classes are in the held-out split."""
        return np.array([row["held_out_accuracy"] for row in self.clients], np.float64)

    @property
    def is_knn(self) -> bool:
        """True if the accuracy is that of a k-NN classifier on the embeddings, because training used no labels."""
        return "knn_neighbours" in self.settings.method

    def __repr__(self) -> str:
        """Name, accuracy, and numbers of rounds and clients."""
        reached = f"{100 * self.metrics['mean_last5_accuracy']:.2f} %, {accuracy.rounds_in_words(len(self.rounds))}"
        clients = f", {len(self.clients)} clients" if self.clients else ""
        return f"Run({self.name}: accuracy {reached}; {len(self.rounds)} rounds{clients})"


def read_run(folder: str | Path) -> Run:
    """Read a finished run and check its files against its checksums.

    Args:
        folder: The run's folder, such as "results/feddifrc-dir05/s0".

    Raises:
        DataError: The run is missing, unfinished or damaged.
    """
    folder = Path(folder).expanduser()
    try:
        return load(folder)
    except FileNotFoundError as error:
        message = f"{folder} holds no finished run ({error.filename} is missing). Finish it by train-fl."
        raise DataError(message) from None


def read_runs(folder: str | Path, pattern: str = "*") -> list[Run]:
    """Read every finished run in a folder, sorted by name; unfinished runs are skipped.

    Args:
        folder: The folder that holds the runs' folders, <method>-<partition>/s<seed>, usually "results".
        pattern: Shell pattern of the runs' names, such as "feddifrc-*".

    Raises:
        DataError: There is no finished run, or one is damaged.
    """
    folder = Path(folder).expanduser()
    warn_of_old_folders(folder)
    names = {file.parent: run_name(file.parent) for file in folder.glob(f"*/s[0-9]*/{provenance.CHECKSUMS}")}
    finished = sorted((run for run, name in names.items() if fnmatch.fnmatchcase(name, pattern)), key=names.__getitem__)
    if not finished:
        raise DataError(f"{folder} holds no finished run named {pattern}. Train one, or correct the path.")
    return [read_run(run) for run in finished]


def warn_of_old_folders(results: Path) -> None:
    """Log a warning if there are runs in the folders of an earlier version, results/<method>-<partition>-s<seed>."""
    old = sorted(file.parent for file in results.glob(f"*-s[0-9]*/{provenance.CHECKSUMS}"))
    if old:
        name, _, seed = old[0].name.rpartition("-")
        others = f" and {len(old) - 1} more" if len(old) > 1 else ""
        log.warning("%s%s: made by an earlier version. Move it to %s to use it.", old[0], others, results / name / seed)


def load(folder: Path) -> Run:
    """Read a run as `read_run` does, but raise FileNotFoundError if a file is missing."""
    present = [name for name in (*_OF_CLIENTS, *_OPTIONAL_FILES) if (folder / name).exists()]
    if changed := provenance.changed_file(folder, [*_FILES, *present]):
        is_list = changed == provenance.CHECKSUMS
        problem = "does not list all files of the run" if is_list else "does not match its checksum"
        raise DataError(f"{folder / changed} {problem}. Train it again, or `dvc checkout` it.")
    settings = manifests.read(folder / "config.json", RunConfig)
    if settings.partition.get("kind") == "nodes":
        nothing: dict[str, Any] = {"label_counts": [], "synthetic_counts": [], "heterogeneity": {}, "clients": []}
        partition = manifests.RunPartition(class_names=settings.agreed.get("class_names", []), **nothing)
        clients = []
    else:
        partition = manifests.read(folder / "partition.json", manifests.RunPartition)
        clients = _rows(folder / "clients.csv", {"held_out_accuracy"})
    metrics = manifests.read(folder / "metrics.json", manifests.RunMetrics).model_dump(exclude_none=True)
    return Run(
        name=run_name(folder),
        settings=settings,
        metrics=metrics | manifests.read(folder / "details.json", manifests.RunDetails).model_dump(),
        rounds=_rows(folder / "rounds.csv", {"accuracy", "loss"}),
        clients=clients,
        class_names=partition.class_names,
        label_counts=np.array(partition.label_counts, np.int64),
        heterogeneity=partition.heterogeneity,
    )


def _rows(file: Path, columns: set[str]) -> list[Row]:
    """Read a table of numbers that has at least these columns and one row."""
    with reading(file):
        text = file.read_text(encoding="utf-8", errors="replace")
    header, *lines = csv.reader(text.splitlines()) if text else [[]]
    try:
        rows = [dict(zip(header, map(_number, cells), strict=True)) for cells in lines]
    except ValueError:
        rows = []
    if not rows or not columns <= rows[0].keys():
        raise DataError(f"{file} is not a table of numbers with {', '.join(sorted(columns))}. Train the run again.")
    return rows


def _number(text: str) -> float:
    if text.isdecimal():
        return int(text)
    return float(text) if text else math.nan


@dataclass(frozen=True, repr=False)
class Summary:
    """Accuracy by method and partition over seeds; its repr is a table.

    Attributes:
        accuracies: (method, partition) -> accuracy of each seed's run, from 0 to 1.
        note: How the numbers were condensed.
    """

    accuracies: dict[tuple[str, str], list[float]]
    note: str

    @property
    def rows(self) -> list[Row]:
        """One row per method and partition; `std_accuracy` is None for a single seed."""
        return [
            {"method": method, "partition": partition, "num_seeds": len(values)}
            | {"mean_accuracy": statistics.fmean(values), "std_accuracy": accuracy.deviation(values)}
            for (method, partition), values in self.accuracies.items()
        ]

    def __repr__(self) -> str:
        """Methods by partitions, in percent, and the note."""
        methods, partitions = (list(dict.fromkeys(names)) for names in zip(*self.accuracies, strict=True))
        cells = {place: accuracy.in_percent(values) for place, values in self.accuracies.items()}
        table = [[method, *(cells.get((method, name), "–") for name in partitions)] for method in methods]
        header = ["method", *partitions]
        aligned = tabulate(table, header, disable_numparse=True, colalign=["left", *("right" for _ in partitions)])
        return f"{aligned}\n{self.note}"


def summary(runs: Sequence[Run]) -> Summary:
    """Condense runs to mean and standard deviation of accuracy over seeds.

    Args:
        runs: Finished runs, in the order of the table; runs of the same method and partition differ in their seeds.

    Raises:
        DataError: There are no runs, or two have the same method, partition and seed.
    """
    if not runs:
        raise DataError("There are no runs to summarise. Read some with `read_runs`.")
    found: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        same = found.setdefault((run.method, run.partition), {})
        if run.seed in same:
            raise DataError(f"{same[run.seed].name} and {run.name} have the same method, partition and seed. Omit one.")
        same[run.seed] = run
    seeds = [sorted(group) for group in found.values()]
    over = accuracy.seeds_in_words(seeds[0]) if all(own == seeds[0] for own in seeds) else "mean ± standard deviation"
    words = f"{accuracy.rounds_in_words(min(len(run.rounds) for run in runs))}; {over}"
    knn = ", ".join(dict.fromkeys(run.method for run in runs if run.is_knn))
    return Summary(
        {place: [run.metrics["mean_last5_accuracy"] for run in group.values()] for place, group in found.items()},
        f"Accuracy, %, {words}." + (f" {knn}: of a k-NN classifier on the embeddings." if knn else ""),
    )
