"""What a run leaves in results/<run>.

rounds.csv         one row a round: accuracy and loss held out, training losses, bytes sent; equal seeds, equal bytes
timing.csv         one row a round: seconds of loading, training, aggregation and evaluation
clients.csv        one row a client: samples, and the final global model's accuracy for it
partition.json     every client's samples and label counts, and statistics of heterogeneity
partition.svg      the same as a picture
model.safetensors  the last global weights
details.json       best accuracy, accuracy by domain, seconds in all and by part, samples per second, bytes
metrics.json       mean-of-last-five and final accuracy; the mean over domains where there are several
config.json        the resolved settings, the hashes of data set and features, software and hardware
SHA256SUMS         the checksums of all these, written last: a run that has them is whole
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from pipeline import accuracy
from pipeline.errors import PipelineError
from pipeline.io import atomic
from pipeline.io.system_errors import reading
from pipeline.settings.config import differing_keys
from stages.train_fl.checkpoint import save_tensors
from stages.train_fl.data import FederatedData
from stages.train_fl.methods import Weights
from stages.train_fl.partitions import heterogeneity, picture
from stages.train_fl.rounds import Round

Row = dict[str, Any]
_PARTS = ("load", "train", "aggregate", "evaluate")


class RunRecord:
    """The rows of a run's rounds so far, kept in its folder after every round."""

    def __init__(self, path: Path, earlier: dict[str, list[Row]] | None = None) -> None:
        """Starts in folder `path`, or goes on from the `rows` of an earlier record."""
        self.path = path
        earlier = earlier or {"rounds": [], "timing": []}
        self._rounds, self._timing = earlier["rounds"], earlier["timing"]
        path.mkdir(parents=True, exist_ok=True)

    @property
    def rows(self) -> dict[str, list[Row]]:
        """All rows so far, as JSON."""
        return {"rounds": self._rounds, "timing": self._timing}

    def add(self, done: Round, scores: dict[str, float], evaluate_seconds: float) -> None:
        """Adds a round and writes the tables, whole: a killed run leaves whole rows."""
        self._rounds.append(
            {"round": done.number, **scores, **{f"train_{k}": v for k, v in done.train_metrics.items()}}
            | {"num_clients": len(done.participants), "num_samples": done.num_samples}
            | {"bytes_down": done.bytes_down, "bytes_up": done.bytes_up}
        )
        self._timing.append(
            {
                "round": done.number,
                "load": done.load_seconds,
                "train": done.train_seconds - done.load_seconds,
                "aggregate": done.aggregate_seconds,
                "evaluate": evaluate_seconds,
            }
        )
        write_csv(self.path / "rounds.csv", self._rounds)
        write_csv(self.path / "timing.csv", self._timing)

    def values(self) -> list[dict[str, float]]:
        """Every round's numbers so far, and its seconds."""
        return [
            {name: value for name, value in row.items() if name != "round"}
            | {"seconds": sum(seconds for part, seconds in timing.items() if part != "round")}
            for row, timing in zip(self._rounds, self._timing, strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        """The run in a few numbers, each a column of `dvc metrics show`."""
        accuracies = [row["accuracy"] for row in self._rounds]
        return {
            "mean_last5_accuracy": accuracy.of_run(accuracies),
            "final_accuracy": accuracies[-1],
        }

    def details(self) -> dict[str, Any]:
        """What else a run comes to: its best accuracy, seconds in all and by part, samples per second, bytes."""
        seconds = {part: sum(row[part] for row in self._timing) for part in _PARTS}
        samples = sum(row["num_samples"] for row in self._rounds)
        return {
            "best_accuracy": max(row["accuracy"] for row in self._rounds),
            "wall_seconds": sum(seconds.values()),
            "seconds": seconds,
            "samples_per_second": samples / (seconds["load"] + seconds["train"]),
            "bytes_down": sum(row["bytes_down"] for row in self._rounds),
            "bytes_up": sum(row["bytes_up"] for row in self._rounds),
        }


def check_replaceable(path: Path, settings: dict[str, Any]) -> None:
    """Checks that folder `path` holds no finished run of other settings or data, which would be lost.

    Raises:
        PipelineError: it does; names what differs. Or the operating system does not say what is there.
    """
    file = path / "config.json"
    try:
        with reading(file):
            found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # no finished run
    if differing := differing_keys(found, settings):
        raise PipelineError(
            f"{path} holds a finished run with another {', '.join(differing)}: move or delete the folder, give "
            "this run another name under methods or partitions, or say --overwrite (flwr run: overwrite=true)"
        )


def start(path: Path) -> None:
    """Makes the folder, and removes what only a finished run has: a run in the making is not taken for whole."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.json", "config.json", "clients.csv", "details.json", "model.safetensors", "SHA256SUMS"):
        (path / name).unlink(missing_ok=True)


def write_partition(path: Path, data: FederatedData) -> None:
    """partition.json and partition.svg in folder `path`."""
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
    """model.safetensors in folder `path`."""
    save_tensors(path / "model.safetensors", {name: value.cpu().contiguous() for name, value in weights.items()})


def write_csv(file: Path, rows: list[Row]) -> None:
    """A table, through a temporary name."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic.write_text(file, stream.getvalue())
