"""The runs of a sweep, and the statistics over seeds that the tables and figures show.

A run's accuracy is the mean over its last five rounds, see `pipeline.accuracy`.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import accuracy, provenance
from pipeline.accuracy import Gain
from pipeline.errors import DataError
from stages.report.runs import Run

TIME_PARTS = ("load", "train", "aggregate", "evaluate")


@dataclass(frozen=True)
class Results:
    """All runs of a sweep; methods, partitions and seeds are in its order."""

    methods: list[str]
    partitions: list[str]
    seeds: list[int]
    runs: dict[tuple[str, str], list[Run]]  # (partition, method) -> one run per seed
    not_in_sweep: list[str]  # names of finished runs that the sweep does not list

    @property
    def labels(self) -> dict[str, str]:
        """Partition -> its label in tables and figures: the usual term, or its name where two would share a label."""
        labels = {name: _label(self.first_run(name).settings.partition) for name in self.partitions}
        return {name: label if list(labels.values()).count(label) == 1 else name for name, label in labels.items()}

    @property
    def baseline(self) -> str | None:
        """The method that gains are measured against: FedAvg without guidance, or else SimSiam, if the sweep has it."""
        of = {
            self._settings(method)["algorithm"]: method
            for method in reversed(self.methods)
            if not self.is_guided(method)
        }
        return of.get("fedavg", of.get("simsiam"))

    @property
    def unguided(self) -> dict[str, str]:
        """Guided method -> the method with the same settings without guidance, for those whose sweep has both."""
        plain = {_identity(self._settings(method)): method for method in self.methods if not self.is_guided(method)}
        pairs = {
            method: plain.get(_identity(self._settings(method))) for method in self.methods if self.is_guided(method)
        }
        return {method: other for method, other in pairs.items() if other}

    @property
    def seen(self) -> dict[str, int]:
        """Method -> images of the data set on which the backbone that guided it was trained, for those above 0."""
        most = {method: max(run.settings.seen_images for run in self.of_method(method)) for method in self.methods}
        return {method: count for method, count in most.items() if count}

    @property
    def noise(self) -> dict[str, float]:
        """Method -> noise of the features that guided it, in standard deviations, for those above 0."""
        most = {method: max(run.settings.feature_noise for run in self.of_method(method)) for method in self.methods}
        return {method: scale for method, scale in most.items() if scale}

    @property
    def weights(self) -> dict[str, tuple[float, float]]:
        """Guided method -> its weights of TDCL and NDCR."""
        settings = {method: self._settings(method) for method in self.methods}
        guidance = {method: own.get("guidance") or own for method, own in settings.items()}
        keys = ("tdcl_weight", "ndcr_weight")
        return {method: (own[keys[0]], own[keys[1]]) for method, own in guidance.items() if set(keys) <= set(own)}

    @property
    def at_chance(self) -> dict[str, list[str]]:
        """Partition -> methods whose mean accuracy is at most 1.1 times that of guessing among all classes."""
        most = 1.1 / max(1, len(self.all_runs[0].class_names))
        return {
            partition: found
            for partition in self.partitions
            if (found := [m for m in self.methods if statistics.fmean(self.accuracies(partition, m)) <= most])
        }

    @property
    def has_variants(self) -> bool:
        """Whether two guided methods differ in their guidance only."""
        guided = [_identity(self._settings(method)) for method in self.methods if self.is_guided(method)]
        return len(guided) > len(set(guided))

    def is_guided(self, method: str) -> bool:
        """Return whether cached features guide the method."""
        settings = self._settings(method)
        return settings["algorithm"] == "feddifrc" or bool(settings.get("guidance"))

    def _settings(self, method: str) -> dict[str, Any]:
        return self.runs[self.partitions[0], method][0].settings.method

    @property
    def all_runs(self) -> list[Run]:
        """All runs, by partition, method and seed."""
        return [run for group in self.runs.values() for run in group]

    def first_run(self, partition: str) -> Run:
        """Return the run of the first method and seed; the clients of its seed are the same for every method."""
        return next(self.runs[partition, method][0] for method in self.methods if (partition, method) in self.runs)

    def of_method(self, method: str) -> list[Run]:
        """Return the method's runs of all partitions and seeds."""
        return [run for partition in self.partitions for run in self.runs[partition, method]]

    def comparable_with(self, method: str) -> list[str]:
        """Return the methods whose accuracy is measured as this method's: by the model itself, or by k-NN."""
        knn = {name: self.runs[self.partitions[0], name][0].is_knn for name in self.methods}
        return [name for name in self.methods if knn[name] == knn[method]]

    def accuracies(self, partition: str | None, method: str) -> list[float]:
        """Return one accuracy per seed; the mean over partitions if `partition` is None."""
        if partition is not None:
            return [run.metrics["mean_last5_accuracy"] for run in self.runs[partition, method]]
        by_partition = [self.accuracies(name, method) for name in self.partitions]
        return [statistics.fmean(of_seed) for of_seed in zip(*by_partition, strict=True)]

    def gain(self, partition: str | None, method: str, other: str) -> Gain:
        """Return the gain of `method` over `other` on a partition; None is the mean over all partitions."""
        return accuracy.gain(self.accuracies(partition, method), self.accuracies(partition, other))

    def rounds_to(self, partition: str, method: str, target: float) -> list[float]:
        """Return, per seed, the first round (from 1) whose accuracy is at least `target`, or infinity."""
        runs = self.runs[partition, method]
        return [next((n for n, value in enumerate(run.accuracy, 1) if value >= target), math.inf) for run in runs]

    def seconds(self, method: str) -> dict[str, float]:
        """Return the mean seconds per run of each of `TIME_PARTS`."""
        runs = self.of_method(method)
        return {part: float(np.mean([run.metrics["seconds"][part] for run in runs])) for part in TIME_PARTS}


def _identity(settings: dict[str, Any]) -> str:
    """Return what equal methods have in common, whatever their names and guidance; FedDifRC is guided FedAvg."""
    if settings["algorithm"] == "feddifrc":
        settings = {"algorithm": "fedavg"}
    own = {key: value for key, value in settings.items() if key not in ("name", "guidance")}
    return provenance.fingerprint(own)


def check_comparable(groups: Iterable[list[Run]]) -> None:
    """Raise DataError if seeds of a group differ in their number of rounds, or any runs in their data or features."""
    dataset: dict[Any, str] = {}
    features: dict[Any, str] = {}
    for group in groups:
        if len({len(run.rounds) for run in group}) > 1:
            raise DataError(f"The seeds of {group[0].name} have different numbers of rounds. Train them again.")
        for run in group:
            dataset[run.settings.dataset.model_dump_json()] = run.name
            if run.settings.features:  # runs without guidance read none
                features[run.settings.features] = run.name
    for kind, found in (("data set", dataset), ("feature set", features)):
        if len(found) > 1:
            one, other = list(found.values())[:2]
            raise DataError(f"{one} and {other} were trained on different versions of the {kind}. Run `dvc repro`.")


def _label(partition: dict[str, Any]) -> str:
    """Label a partition by its settings, as papers head a column."""
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
            return f"{count} classes each" if count > 1 else "1 class each"
        case _:
            return str(partition["name"])
