"""The files of a run in results/<method>-<partition>/s<seed>, and the means over seeds.

rounds.csv         one row per round: held-out accuracy and loss, training losses, bytes sent; equal seeds, equal bytes
timing.csv         one row per round: seconds of loading, training, aggregation and evaluation
clients.csv        one row per client: samples, and the final global model's accuracy for it
partition.json     samples and label counts of every client, and statistics of heterogeneity
partition.svg      the partition as a figure
model.safetensors  the last global weights
details.json       best accuracy, accuracy by domain, total seconds and seconds by part, samples per second, bytes
metrics.json       final accuracy and the mean of the last five rounds; with several domains, the mean over them
config.json        the resolved settings, the hashes of data set and features, software and hardware
SHA256SUMS         the checksums of all these, written last: a run that has them is complete

Runs over nodes with images of their own have no clients.csv, partition.json and partition.svg.
`pipeline.manifests` has the JSON files as typed models.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pipeline import accuracy, manifests, provenance
from pipeline.errors import ConfigError, DataError
from pipeline.io import atomic
from pipeline.io.system_errors import reading
from pipeline.settings.config import differing_keys
from stages.train_fl.data import FederatedData
from stages.train_fl.methods import Weights
from stages.train_fl.partitions import heterogeneity, picture
from stages.train_fl.rounds import Round

RoundRow = dict[str, Any]
_FILES = (
    "rounds.csv",
    "timing.csv",
    "clients.csv",
    "partition.json",
    "partition.svg",
    "model.safetensors",
    "details.json",
)
_PARTS = ("load", "train", "aggregate", "evaluate")


class RunRecord:
    """The rows of a run's rounds so far, written to its folder after every round."""

    def __init__(self, path: Path, earlier: dict[str, list[RoundRow]] | None = None) -> None:
        """Write to folder `path`, continuing the `rows` of an earlier record if there is one."""
        self.path = path
        earlier = earlier or {"rounds": [], "timing": []}
        self._rounds, self._timing = earlier["rounds"], earlier["timing"]

    @property
    def rows(self) -> dict[str, list[RoundRow]]:
        """All rows so far, as JSON."""
        return {"rounds": self._rounds, "timing": self._timing}

    def add(self, done: Round, scores: dict[str, float], evaluate_seconds: float) -> None:
        """Add a round and write the tables."""
        self._rounds.append(round_row(done, scores))
        training = done.train_seconds - done.load_seconds
        seconds = (done.load_seconds, training, done.aggregate_seconds, evaluate_seconds)
        self._timing.append({"round": done.number, **dict(zip(_PARTS, seconds, strict=True))})
        # Not synced: after a power cut the checkpoint, which has the rows too, writes them again.
        atomic.write_csv(self.path / "rounds.csv", self._rounds, sync=False)
        atomic.write_csv(self.path / "timing.csv", self._timing, sync=False)

    def values(self) -> list[dict[str, float]]:
        """Return the numbers of every round so far, with its total seconds, for loggers."""
        return [
            {name: value for name, value in row.items() if name != "round"}
            | {"seconds": sum(seconds for part, seconds in timing.items() if part != "round")}
            for row, timing in zip(self._rounds, self._timing, strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        """Return the run's main results, of which `write_means` takes the mean over seeds."""
        accuracies = [row["accuracy"] for row in self._rounds]
        return {"mean_last5_accuracy": accuracy.of_run(accuracies), "final_accuracy": accuracies[-1]}

    def details(self) -> dict[str, Any]:
        """Return best accuracy, total seconds and seconds by part, samples per second, and bytes."""
        seconds = {part: sum(row[part] for row in self._timing) for part in _PARTS}
        samples = sum(row["num_samples"] for row in self._rounds)
        return {
            "best_accuracy": max(row["accuracy"] for row in self._rounds),
            "wall_seconds": sum(seconds.values()),
            "seconds": seconds,
            "samples_per_second": samples / (seconds["load"] + seconds["train"]),
            # With those of the models that nodes evaluate, if they do.
            "bytes_down": sum(row["bytes_down"] + row.get("evaluation_bytes", 0) for row in self._rounds),
            "bytes_up": sum(row["bytes_up"] for row in self._rounds),
        }


def round_row(done: Round, scores: dict[str, float]) -> RoundRow:
    """Return the row of a round: its number, held-out scores, training losses, participants and bytes."""
    return {
        "round": done.number,
        **scores,
        **{f"train_{name}": value for name, value in done.train_metrics.items()},
        "num_clients": len(done.participants),
        "num_samples": done.num_samples,
        "bytes_down": done.bytes_down,
        "bytes_up": done.bytes_up,
    }


def check_replaceable(path: Path, settings: dict[str, Any]) -> None:
    """Raise ConfigError, with the settings that differ, if `path` holds a finished run of other settings or data."""
    file = path / "config.json"
    try:
        with reading(file):
            found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # no finished run
    if differing := differing_keys(found, settings):
        raise ConfigError(
            f"{path} holds a finished run of other settings or data ({', '.join(differing)}). Move or delete the "
            "folder, rename this run's entry under methods or partitions, or pass --overwrite "
            "(flwr run: overwrite=true)."
        )


def is_complete(path: Path, settings: dict[str, Any]) -> bool:
    """Return whether `path` holds an undamaged finished run of these settings and data, whatever software made it.

    Raise SystemRefusal if a file is unreadable.
    """
    present = [name for name in _FILES if (path / name).exists()]
    with reading(path):
        try:
            listed = provenance.listed_files(path)
            is_cut = not all(listed)  # a line that was cut off has no name
            if is_cut or provenance.changed_file(path, {*listed, "config.json", "metrics.json", *present}):
                return False
            found = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False  # not finished
    if not isinstance(found, dict):
        return False
    found.pop("provenance", None)
    return provenance.fingerprint(found) == provenance.fingerprint(settings)


def is_of_other_software(path: Path) -> bool:
    """Return whether other code, or other versions of packages, made the finished run in `path`, or it is unknown.

    Code is compared by its hash, not its commit, which an edit of params.yaml makes dirty.
    """
    wanted = provenance.software() | {"code": provenance.code_sha256()}
    del wanted["commit"]
    with reading(path):
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return bool(differing_keys(found.get("provenance"), wanted))


def write_means(file: Path, runs: Sequence[Path]) -> None:
    """Write the means of the metrics that all these runs have, and their number.

    With two runs or more, also the standard deviation of mean_last5_accuracy, by a short name: these are the columns of
    `dvc metrics show`, and DVC's experiments have no other numbers. If a run is not finished or has other settings, the
    file is removed.
    """
    try:
        if len({_settings_without_seed(run) for run in runs}) > 1:
            raise DataError("the runs have different settings")
        metrics = [manifests.read(run / "metrics.json", manifests.RunMetrics) for run in runs]
    except (DataError, OSError, ValueError):
        file.unlink(missing_ok=True)
        return
    found = [own.model_dump(exclude_none=True) for own in metrics]
    means = {
        name: statistics.fmean(own[name] for own in found) for name in found[0] if all(name in own for own in found)
    }
    deviation = accuracy.deviation([own["mean_last5_accuracy"] for own in found])
    means |= {} if deviation is None else {"std": deviation}
    atomic.write_json(file, means | {"num_seeds": len(runs)})


def _settings_without_seed(run: Path) -> str:
    """Return the fingerprint of a finished run's settings; raise OSError or ValueError if it is not finished."""
    (run / provenance.CHECKSUMS).stat()
    found = dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    return provenance.fingerprint(
        {key: value for key, value in found.items() if key not in ("seed", "provenance", "synthetic")}
    )


def start(path: Path) -> None:
    """Create the folder, and remove the files of a finished run, first the one that marks it as finished."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("SHA256SUMS", "metrics.json", "config.json", "clients.csv", "details.json", "model.safetensors"):
        (path / name).unlink(missing_ok=True)


def write_partition(path: Path, data: FederatedData) -> None:
    """Write partition.json and partition.svg to folder `path`."""
    class_names = data.dataset.class_names
    content = {
        "class_names": class_names,
        "label_counts": data.label_counts.tolist(),
        "synthetic_counts": data.synthetic_counts.tolist(),
        "heterogeneity": heterogeneity(data.label_counts),
        "clients": [part.tolist() for part in data.parts],
    }
    atomic.write_json(path / "partition.json", content)
    picture.write(path / "partition.svg", data.label_counts, class_names)


def write_weights(path: Path, weights: Weights) -> None:
    """Write model.safetensors to folder `path`."""
    with atomic.replace_file(path / "model.safetensors") as temporary:
        save_file({name: value.cpu().contiguous() for name, value in weights.items()}, temporary)
        temporary.chmod(path.stat().st_mode & 0o666)  # safetensors lets nobody else read it
