"""Run the stage: read the runs of the sweep, and write one self-contained page, a summary and the curves.

report/index.html    tables, curves, clients, bytes, time, provenance of every number; opens without a network
report/summary.json  partition -> method -> accuracy of each seed, mean, standard deviation, and gain over the baseline
report/curves.csv    method, partition, round, accuracy, loss: means over seeds, for `dvc plots`
"""

import contextlib
import itertools
import logging
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pipeline import plotting, run_digests
from pipeline.data.datasets import PreparedDataset
from pipeline.errors import DataError, PipelineError
from pipeline.feature_store import read_manifest
from pipeline.io import atomic
from pipeline.manifests import run_name
from pipeline.settings.config import Config
from stages.report import analysis, experiments, figures, formats, results, runs, tables
from stages.report.analysis import Analysis
from stages.report.formats import Table
from stages.report.results import Results
from stages.report.runs import Run

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent


def run(config: Config, with_experiments: bool = False, with_sweep: bool = False) -> Path:
    """Write the report of the sweep in params.yaml.

    Args:
        config: The project's configuration.
        with_experiments: Add a table of DVC's experiments.
        with_sweep: Show the results of sweep-features. It is not a stage of `dvc repro`, whose report omits it.

    Returns:
        Path of the page.

    Raises:
        PipelineError: A run of the sweep is missing, damaged, or was made with other settings.
    """
    found = read_sweep(config)
    if config.sweep_is_as_written:  # DVC does not know a sweep given on the command line
        run_digests.complete(config.sweep_dir, config.runs_of_sweep)
    _warn_of_other_inputs(config, found)
    if found.not_in_sweep:
        log.warning("Not in the report, because the sweep does not list them: %s", ", ".join(found.not_in_sweep))
    analysed = analysis.read(config.root, found, with_sweep)
    for reason in analysed.omitted:
        log.warning("Not in the report: %s", reason)
    folder = config.root / "report"
    folder.mkdir(exist_ok=True)
    atomic.write_json(folder / "summary.json", _summary(found))
    atomic.write_csv(folder / "curves.csv", _mean_curves(found))
    shown = _tables(config.root, found, with_experiments)
    atomic.write_text(folder / "index.html", _page(config.params.report.title, found, shown, analysed))
    return folder / "index.html"


def as_text(config: Config, form: str, with_experiments: bool = False) -> str:
    """Return all tables as "markdown" or "latex"; raise PipelineError as `run` does."""
    write = {"markdown": formats.to_markdown, "latex": formats.to_latex}[form]
    return "\n".join(map(write, _tables(config.root, read_sweep(config), with_experiments)))


def read_sweep(config: Config) -> Results:
    """Read and check every run that the sweep in params.yaml lists; raise PipelineError as `run` does."""
    sweep = config.params.sweep
    runs.warn_of_old_folders(config.results_dir)
    missing = [run_name(path) for path in config.runs_of_sweep if not path.exists()]
    if len(missing) > 1:
        raise DataError(
            f"{len(missing)} of the {len(config.runs_of_sweep)} runs of the sweep are missing ({missing[0]}, ...). Run "
            f"`dvc repro`{_flags_for_what_is_there(config)}."
        )
    groups = {
        (partition, method): [_read(config, method, partition, seed) for seed in sweep.seeds]
        for partition in sweep.partitions
        for method in sweep.methods
    }
    results.check_comparable(groups.values())
    finished = {file.parent for file in config.results_dir.glob("*/s[0-9]*/config.json")}
    not_in_sweep = sorted(map(run_name, finished.difference(config.runs_of_sweep)))
    return Results(sweep.methods, sweep.partitions, sweep.seeds, groups, not_in_sweep)


def _warn_of_other_inputs(config: Config, found: Results) -> None:
    """Warn if the runs were trained from other images or features than those that params.yaml names and are here."""
    settings = [run.settings for run in found.all_runs]
    used: dict[Path, set[str | None]] = {
        config.dataset_dir: {own.dataset.hash for own in settings},
        config.features_dir: {own.features for own in settings if own.features},
    }
    for path, identities in used.items():
        with contextlib.suppress(PipelineError):  # it is elsewhere
            data = PreparedDataset(path).hash if path == config.dataset_dir else read_manifest(path).fingerprint
            if identities - {data}:
                log.warning(
                    "Runs were trained from other data than %s now has; the report shows them as they are", path
                )


def _flags_for_what_is_there(config: Config) -> str:
    """Return how to report the methods that have a run of the first partition and seed of which there is any."""
    sweep = config.params.sweep
    for partition, seed in itertools.product(sweep.partitions, sweep.seeds):
        there = [method for method in sweep.methods if config.run_dir(method, partition, seed).exists()]
        if there:
            flags = {"methods": ", ".join(there), "partitions": partition, "seeds": seed}
            written = " ".join(f"--set sweep.{key}='[{value}]'" for key, value in flags.items())
            return f", or report fewer runs, for example with {written}"
    return ""


def _read(config: Config, method: str, partition: str, seed: int) -> Run:
    folder = config.run_dir(method, partition, seed)
    try:
        found = runs.load(folder)
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename} is missing. Run `pipeline train-fl --method {method} --partition {partition} "
            f"--seed {seed}`, or remove the run from sweep in params.yaml."
        ) from None
    run_digests.check(config.sweep_dir, folder)
    config.check_settings_of_run(folder, found.settings.model_dump(), method, partition)
    if not found.clients:
        raise DataError(
            f"{folder} was trained on nodes with images of their own, which the report cannot show. Remove it from "
            "sweep in params.yaml; `read_runs` in Python reads it."
        )
    return found


def _tables(root: Path, found: Results, with_experiments: bool) -> list[Table]:
    extra = experiments.table(root) if with_experiments else None
    return [*tables.make(found), *([extra] if extra else [])]


def _page(title: str, found: Results, shown: list[Table], analysed: Analysis) -> str:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True)
    number = itertools.count()
    environment.filters["inline"] = lambda svg: plotting.inline(svg, next(number))
    most = max(int(found.first_run(partition).label_counts.max()) for partition in found.partitions)
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=_subtitle(found),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        js=(_HERE / "page.js").read_text(encoding="utf-8"),
        tables={table.name: table for table in shown},
        pens=figures.pens(found.methods),
        gains=[figures.gains(found, partition) for partition in found.partitions if found.unguided],
        accuracy_curves=figures.curves(found, "accuracy"),
        loss_curves=figures.curves(found, "loss"),
        client_spread=[figures.client_spread(found, partition) for partition in found.partitions],
        time_split=figures.time_split(found),
        clients_by_class=[figures.clients_by_class(found, partition, most) for partition in found.partitions],
        most=most,
        most_points=figures.MOST_POINTS,
        runs={run.name: run.settings.model_dump(exclude_unset=True) for run in found.all_runs},
        not_in_sweep=found.not_in_sweep,
        analysis=analysed,
    )


def _subtitle(found: Results) -> str:
    settings = found.all_runs[0].settings
    train = settings.train_fl
    clients = " or ".join(map(str, sorted({len(run.label_counts) for run in found.all_runs})))
    rounds, epochs = _counted(train["num_rounds"], "round"), _counted(train["local_epochs"], "local epoch")
    size = f"{_counted(len(found.methods), 'method')}, {_counted(len(found.partitions), 'partition')}"
    seeds = f"{'seeds' if len(found.seeds) > 1 else 'seed'} {', '.join(map(str, found.seeds))}"
    federation = f"{clients} clients, {train['clients_per_round']} per round"
    return f"{settings.dataset.name}, {train['model']}; {federation}; {rounds} of {epochs}; {size}, {seeds}."


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _summary(found: Results) -> dict[str, dict[str, Any]]:
    """Return partition -> method -> accuracies from 0 to 1, and the gain over FedAvg or, for guided methods, their own.

    `gain_half_width` is half the width of the gain's 95 % confidence interval.
    """
    summary: dict[str, dict[str, Any]] = {partition: {} for partition in found.partitions}
    for row in runs.summary(found.all_runs).rows:
        partition, method = row["partition"], row["method"]
        own: dict[str, Any] = {key: row[key] for key in ("mean_accuracy", "std_accuracy")}
        own["accuracies"] = found.accuracies(partition, method)
        other = found.unguided.get(method, found.baseline)
        if other in found.comparable_with(method) and other != method:
            gain = found.gain(partition, method, other)
            own |= {"gain_over": other, "gain": gain.mean, "gain_half_width": gain.half_width}
        summary[partition][method] = own
    return summary


def _mean_curves(found: Results) -> list[dict[str, Any]]:
    """Return a row per method, partition and round: means over seeds."""
    rows = []
    for (partition, method), group in found.runs.items():
        means = (np.mean([getattr(run, name) for run in group], axis=0).tolist() for name in ("accuracy", "loss"))
        for number, (reached, loss) in enumerate(zip(*means, strict=True), start=1):
            row = {"method": method, "partition": partition, "round": number}
            rows.append(row | {"accuracy": round(reached, 6), "loss": round(loss, 6)})
    return rows
