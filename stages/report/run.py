"""Runs the stage: reads the runs of the sweep and writes one self-contained page, a summary and the curves.

report/index.html    accuracy table, curves, label distributions, provenance; no network
report/summary.json  per partition and method: mean and standard deviation of accuracy over seeds
report/curves.csv    method, partition, round, accuracy, loss: means over seeds, for `dvc plots`
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from pipeline import atomic, provenance  # noqa: E402
from pipeline.config import Config  # noqa: E402
from pipeline.errors import PipelineError  # noqa: E402


@dataclass(frozen=True)
class Run:
    """One finished run, as its folder tells it."""

    method: str
    partition: str
    seed: int
    metrics: dict[str, Any]
    config: dict[str, Any]
    label_counts: np.ndarray  # (num_clients, num_classes)
    accuracy: np.ndarray  # (num_rounds,)
    loss: np.ndarray  # (num_rounds,)


def run(config: Config) -> Path:
    """Writes the report of the sweep in params.yaml.

    Returns:
        The page.

    Raises:
        PipelineError: a run of the sweep is missing or unreadable.
    """
    sweep = config.params.sweep
    runs = {
        (partition, method): [_read(config, method, partition, seed) for seed in sweep.seeds]
        for partition in sweep.partitions
        for method in sweep.methods
    }
    folder = config.root / "report"
    folder.mkdir(exist_ok=True)
    summary = {
        partition: {method: _summarise(runs[partition, method]) for method in sweep.methods}
        for partition in sweep.partitions
    }
    provenance.write_json(folder / "summary.json", summary)
    _write_curves(folder / "curves.csv", runs)
    template = jinja2.Template((Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8"), autoescape=True)
    first = runs[sweep.partitions[0], sweep.methods[-1]][0]
    page = template.render(
        title=config.params.report.title,
        methods=sweep.methods,
        partitions=sweep.partitions,
        seeds=sweep.seeds,
        summary=summary,
        best={p: _best(summary[p]) for p in sweep.partitions},
        curves=_draw_curves(runs, sweep.partitions, sweep.methods),
        clients=_draw_clients(runs, sweep.partitions, sweep.methods[0]),
        settings=json.dumps(first.config, indent=2),
    )
    atomic.write_text(folder / "index.html", page)
    return folder / "index.html"


def _read(config: Config, method: str, partition: str, seed: int) -> Run:
    folder = config.run_dir(method, partition, seed)
    try:
        with (folder / "rounds.csv").open(encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.check_settings_of_run(folder, settings, method, partition)
        return Run(
            method,
            partition,
            seed,
            json.loads((folder / "metrics.json").read_text(encoding="utf-8")),
            settings,
            np.array(json.loads((folder / "partition.json").read_text(encoding="utf-8"))["label_counts"]),
            np.array([float(row["accuracy"]) for row in rows]),
            np.array([float(row["loss"]) for row in rows]),
        )
    except FileNotFoundError as error:
        raise PipelineError(
            f"{error.filename} is missing: run `pipeline train-fl --method {method} --partition {partition} "
            f"--seed {seed}`, or take the run out of sweep in params.yaml"
        ) from None
    except (ValueError, KeyError) as error:
        raise PipelineError(f"{folder} does not hold a whole run ({error!r}): train it again") from None


def _best(by_method: dict[str, dict[str, float]]) -> str:
    return max(by_method, key=lambda method: by_method[method]["mean_accuracy"])


def _summarise(runs: list[Run]) -> dict[str, float]:
    """Over seeds: mean and sample standard deviation of the mean-of-last-five accuracy; mean best; mean seconds."""
    last = np.array([run.metrics["mean_last5_accuracy"] for run in runs])
    return {
        "mean_accuracy": float(last.mean()),
        "std_accuracy": float(last.std(ddof=1)) if len(last) > 1 else 0.0,
        "best_accuracy": float(np.mean([run.metrics["best_accuracy"] for run in runs])),
        "wall_seconds": float(np.mean([run.metrics["wall_seconds"] for run in runs])),
    }


def _write_curves(path: Path, runs: dict[tuple[str, str], list[Run]]) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "partition", "round", "accuracy", "loss"])
    for (partition, method), group in runs.items():
        accuracy = np.mean([run.accuracy for run in group], axis=0)
        loss = np.mean([run.loss for run in group], axis=0)
        for number, (a, b) in enumerate(zip(accuracy, loss, strict=True), start=1):
            writer.writerow([method, partition, number, round(float(a), 6), round(float(b), 6)])
    atomic.write_text(path, stream.getvalue())


def _draw_curves(runs: dict[tuple[str, str], list[Run]], partitions: list[str], methods: list[str]) -> str:
    figure, panels = plt.subplots(1, len(partitions), figsize=(4.2 * len(partitions), 3.4), sharey=True, squeeze=False)
    for panel, partition in zip(panels[0], partitions, strict=True):
        for method in methods:
            accuracy = 100 * np.stack([run.accuracy for run in runs[partition, method]])
            rounds = np.arange(1, accuracy.shape[1] + 1)
            panel.plot(rounds, accuracy.mean(0), label=method)
            panel.fill_between(rounds, accuracy.min(0), accuracy.max(0), alpha=0.15)
        panel.set(title=partition, xlabel="round")
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("accuracy, %")
    panels[0, 0].legend()
    return _svg(figure)


def _draw_clients(runs: dict[tuple[str, str], list[Run]], partitions: list[str], method: str) -> str:
    figure, panels = plt.subplots(1, len(partitions), figsize=(4.2 * len(partitions), 3.4), squeeze=False)
    for panel, partition in zip(panels[0], partitions, strict=True):
        counts = runs[partition, method][0].label_counts
        left = np.zeros(len(counts))
        colours = plt.get_cmap("tab20")(np.linspace(0, 1, counts.shape[1]))
        for label in range(counts.shape[1]):
            panel.barh(np.arange(len(counts)), counts[:, label], left=left, color=colours[label])
            left += counts[:, label]
        panel.set(title=f"{partition}, first seed", xlabel="images, coloured by class")
        panel.invert_yaxis()
    panels[0, 0].set_ylabel("client")
    return _svg(figure)


def _svg(figure: Any) -> str:
    """Inline SVG with stable ids and no date, so that equal results give equal bytes."""
    figure.tight_layout()
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "feddifrc"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
