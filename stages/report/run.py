"""Runs the stage: reads the runs of the sweep and writes one self-contained page, a summary and the curves.

report/index.html    tables, curves, clients, bytes, time, provenance of every number; no network
report/summary.json  per partition and method: mean and standard deviation of accuracy over seeds
report/curves.csv    method, partition, round, accuracy, loss: means over seeds, for `dvc plots`
"""

import csv
import io
import itertools
import logging
import statistics
from pathlib import Path

import jinja2
import numpy as np

from pipeline import accuracy, plotting, run_digests
from pipeline.io import atomic
from pipeline.settings.config import Config
from stages.report import analysis, experiments, figures, results, tables
from stages.report.analysis import Analysis
from stages.report.results import Results
from stages.report.tables import Table

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent


def run(config: Config, with_experiments: bool = False, with_sweep: bool = False) -> Path:
    """Writes the report of the sweep in params.yaml.

    Args:
        config: the project's configuration.
        with_experiments: add a table of DVC's experiments.
        with_sweep: show what sweep-features found; it is no stage of `dvc repro`, whose report does without.

    Returns:
        The page.

    Raises:
        PipelineError: a run of the sweep is missing, unreadable or was made with other settings.
    """
    found = results.read(config)
    run_digests.complete(config)
    if found.others:
        log.warning("not in the report, because the sweep does not name them: %s", ", ".join(found.others))
    analysed = analysis.read(config.root, found, with_sweep)
    for reason in analysed.left_out:
        log.warning("not in the report: %s", reason)
    folder = config.root / "report"
    folder.mkdir(exist_ok=True)
    atomic.write_json(folder / "summary.json", _summary(found))
    _write_curves(folder / "curves.csv", found)
    shown = _tables(config.root, found, with_experiments)
    atomic.write_text(folder / "index.html", _page(config.params.report.title, found, shown, analysed))
    return folder / "index.html"


def as_text(config: Config, form: str, with_experiments: bool = False) -> str:
    """All tables as "markdown" or "latex".

    Raises:
        PipelineError: as `run`.
    """
    write = {"markdown": tables.to_markdown, "latex": tables.to_latex}[form]
    return "\n".join(map(write, _tables(config.root, results.read(config), with_experiments)))


def _tables(root: Path, found: Results, with_experiments: bool) -> list[Table]:
    more = experiments.table(root) if with_experiments else None
    return tables.make(found) + ([more] if more else [])


def _page(title: str, found: Results, shown: list[Table], analysed: Analysis) -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True)
    number = itertools.count()
    environment.filters["inline"] = lambda svg: plotting.inline(svg, next(number))
    first_runs = [found.runs[partition, found.methods[0]][0] for partition in found.partitions]
    most = max(int(run.label_counts.max()) for run in first_runs)
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=_subtitle(found),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        js=(_HERE / "page.js").read_text(encoding="utf-8"),
        tables={table.name: table for table in shown},
        pens=figures.pens(found.methods),
        accuracy_curves=figures.curves(found, "accuracy"),
        loss_curves=figures.curves(found, "loss"),
        client_spread=[figures.client_spread(found, partition) for partition in found.partitions],
        time_split=figures.time_split(found),
        clients_by_class=[figures.clients_by_class(run, found.labels[run.partition], most) for run in first_runs],
        most=most,
        runs=found.all_runs,
        others=found.others,
        analysis=analysed,
    )


def _subtitle(found: Results) -> str:
    """What was run, in one sentence."""
    run = found.all_runs[0]
    train = run.config["train_fl"]
    clients = sorted({len(run.label_counts) for run in found.all_runs})
    return (
        f"{run.config['dataset']['name']}, {train['model']}; {' or '.join(map(str, clients))} clients, "
        f"{train['clients_per_round']} a round, {_counted(train['num_rounds'], 'round')} of "
        f"{_counted(train['local_epochs'], 'local epoch')}; "
        f"{_counted(len(found.methods), 'method')}, {_counted(len(found.partitions), 'setting')}, "
        f"{'seeds' if len(found.seeds) > 1 else 'seed'} {', '.join(map(str, found.seeds))}."
    )


def _counted(count: int, of: str) -> str:
    return f"{count} {of}" if count == 1 else f"{count} {of}s"


def _summary(found: Results) -> dict[str, dict[str, dict[str, float | None]]]:
    """Partition -> method -> accuracy over seeds."""
    summary: dict[str, dict[str, dict[str, float | None]]] = {}
    for partition, method in found.runs:
        values = found.accuracies(partition, method)
        summary.setdefault(partition, {})[method] = {
            "mean_accuracy": statistics.fmean(values),
            "std_accuracy": accuracy.deviation(values),
        }
    return summary


def _write_curves(path: Path, found: Results) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "partition", "round", "accuracy", "loss"])
    for (partition, method), group in found.runs.items():
        accuracy = np.mean([run.accuracy for run in group], axis=0)
        loss = np.mean([run.loss for run in group], axis=0)
        for number, (a, b) in enumerate(zip(accuracy, loss, strict=True), start=1):
            writer.writerow([method, partition, number, round(float(a), 6), round(float(b), 6)])
    atomic.write_text(path, stream.getvalue())
