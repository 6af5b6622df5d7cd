"""The report's tables: which rows and columns each has, and what its cells say."""

import math
import statistics
from collections.abc import Callable, Mapping

import numpy as np

from pipeline import accuracy
from stages.report.formats import Cell, Table
from stages.report.results import TIME_PARTS, Results
from stages.report.runs import Run

_MEAN = "mean of partitions"  # a column beside the partitions, whose names have no spaces


def make(results: Results) -> list[Table]:
    """Make every table for which the runs have data."""
    tables = [_accuracy(results), _guidance(results), _linear_probe(results), _rounds_to_baseline(results)]
    tables += [_clients(results), _domains(results)]
    tables += [_communication(results), _time(results), _partitions(results), _provenance(results)]
    return [table for table in tables if table]


def _accuracy(results: Results) -> Table:
    """Lay out methods by partitions as in the paper: mean ± deviation over seeds, best in bold, gains over a baseline.

    The accuracy of a k-NN classifier is not compared with that of a model.
    """
    columns = _columns_with_mean(results)
    by_seed = {
        (column, method): results.accuracies(None if column == _MEAN else column, method)
        for column in columns
        for method in results.methods
    }

    def cell(column: str, method: str) -> Cell:
        own = by_seed[column, method]
        comparable = results.comparable_with(method)
        is_best = _is_best(own, [by_seed[column, other] for other in comparable])
        has_gain = results.baseline in comparable and results.baseline != method
        gain = str(accuracy.gain(own, by_seed[column, str(results.baseline)])) if has_gain else ""
        return Cell(accuracy.in_percent(own), statistics.fmean(own), is_best, gain)

    num_rounds = min(len(run.rounds) for run in results.all_runs)
    note = f"{_measure(results)}, %, {accuracy.in_words(num_rounds, results.seeds)}"
    note += ". Best in bold" if len(results.methods) > 1 else ""
    if results.baseline and len(results.methods) > 1:
        note += f"; small or in brackets: the gain over {results.baseline}, {accuracy.gain_in_words(results.seeds)}"
        if len(results.seeds) > 1:
            note += ". An interval that contains 0 does not tell whether there is a gain; more seeds make it narrower"
    note += "."
    note += _cautions(results)
    return _by_method("accuracy", "Accuracy", note, results, columns, cell)


def _cautions(results: Results) -> str:
    """Return sentences on how the methods were guided and what makes their comparison unfair or weak, or nothing."""
    note = ""
    if weights := results.weights:
        named = "; ".join(f"{method}: {tdcl:g} and {ndcr:g}" for method, (tdcl, ndcr) in weights.items())
        note += f" Weights of TDCL and NDCR, which the paper sets to 1: {named}."
    for partition, methods in results.at_chance.items():
        note += (
            f" At most 1.1 times chance (1 of {len(results.all_runs[0].class_names)} classes) on "
            f"{results.labels[partition]}: {', '.join(methods)}. A gain over such a method says little."
        )
    if results.has_variants and results.all_runs[0].settings.train_fl["evaluate_on"] == "test":
        note += (
            " Several variants of the guidance are compared on the test images: the best one looks better than it is. "
            "Choose among them with train_fl.evaluate_on: validation."
        )
    if seen := results.seen:
        named = ", ".join(f"{method}: {count}" for method, count in seen.items())
        note += f" Guided by a backbone that was trained on images of this data set, an unfair advantage ({named})."
    if noise := results.noise:
        named = ", ".join(f"{method}: {scale:g}" for method, scale in noise.items())
        note += f" Guided by features with noise, in standard deviations ({named})."
    return note


def _guidance(results: Results) -> Table | None:
    """Show what guidance adds to each method, if the sweep has another pair than the baseline and its guided form."""
    pairs = results.unguided
    if set(pairs.values()) <= {results.baseline}:
        return None
    columns = _columns_with_mean(results)
    gains = {
        (column, method): results.gain(None if column == _MEAN else column, method, plain)
        for column in columns
        for method, plain in pairs.items()
    }

    def cell(column: str, method: str) -> Cell:
        gain = gains[column, method]
        better = sum(value > 0 for value in gain.by_seed)
        remark = f"{better} of {len(gain.by_seed)} seeds better" if len(gain.by_seed) > 1 else ""
        return Cell(str(gain), gain.mean, gain.sign > 0, remark)

    def over_all(column: str) -> Cell:
        found = [gains[column, method] for method in pairs]
        values = [value for gain in found for value in gain.by_seed]
        above, below = (sum(gain.sign == sign for gain in found) for sign in (1, -1))
        remark = f"intervals: {above} above 0, {below} below, of {len(found)}" if len(results.seeds) > 1 else ""
        return Cell(f"{sum(value > 0 for value in values)} of {len(values)} better", math.nan, remark=remark)

    rows = [
        [Cell(f"{method} over {plain}"), *(cell(column, method) for column in columns)]
        for method, plain in pairs.items()
    ]
    rows.append([Cell("all"), *map(over_all, columns)])
    note = f"Points of accuracy that guidance adds to a method, {accuracy.gain_in_words(results.seeds)}."
    note += " Bold: above 0." if len(results.seeds) > 1 else ""
    return Table("guidance", "Gain by guidance", note, ["guided method", *columns.values()], rows)


def _columns_with_mean(results: Results) -> dict[str, str]:
    return results.labels | ({_MEAN: "mean"} if len(results.partitions) > 1 else {})


def _is_best(own: list[float], compared: list[list[float]]) -> bool:
    """Return whether no other mean is higher at the two decimals of a percent that are shown."""
    return len(compared) > 1 and f"{statistics.fmean(own):.4f}" == f"{max(map(statistics.fmean, compared)):.4f}"


def _measure(results: Results) -> str:
    """Describe which classifier the accuracies are of, and on which images."""
    on = f"on the {results.all_runs[0].settings.train_fl['evaluate_on']} images"  # test or validation
    knn_methods = [method for method in results.methods if results.of_method(method)[0].is_knn]
    knn = f"k-NN classifier on the global model's embeddings, {on}"
    if not knn_methods:
        return f"Global model {on}"
    if knn_methods == results.methods:
        return knn
    return f"Global model {on} ({', '.join(knn_methods)}: {knn}, not compared with the others)"


def _linear_probe(results: Results) -> Table | None:
    """Compare methods without labels by a linear probe; runs of other methods have none."""

    def probes(partition: str, method: str) -> list[float]:
        key, runs = "linear_probe_accuracy", results.runs[partition, method]
        return [run.metrics[key] for run in runs if run.metrics.get(key) is not None]

    def cell(partition: str, method: str) -> Cell:
        if not (own := probes(partition, method)):
            return Cell("–", math.nan)
        known = [values for other in results.methods if (values := probes(partition, other))]
        return Cell(accuracy.in_percent(own), statistics.fmean(own), _is_best(own, known))

    if not any(probes(*place) for place in results.runs):
        return None
    note = (
        "Accuracy of a linear classifier on the final global model's frozen embeddings, fitted to the labelled "
        "training images of all clients, %; only for methods without labels. Best in bold."
    )
    return _by_method("probe", "Linear probe", note, results, results.labels, cell)


def _rounds_to_baseline(results: Results) -> Table | None:
    if results.baseline is None or len(results.methods) < 2:
        return None
    targets = {p: statistics.fmean(results.accuracies(p, results.baseline)) for p in results.partitions}

    def cell(partition: str, method: str) -> Cell:
        if results.baseline not in results.comparable_with(method):
            return Cell("–", math.nan)
        rounds = results.rounds_to(partition, method, targets[partition])
        reached = sum(map(math.isfinite, rounds))
        remark = f"{reached} of {len(rounds)} seeds" if 0 < reached < len(rounds) else ""
        median = statistics.median(rounds)
        not_reached = f"> {len(results.runs[partition, method][0].rounds)}" if reached else "never"
        return Cell(f"{median:g}" if math.isfinite(median) else not_reached, median, remark=remark)

    columns = {p: f"{label} ({100 * targets[p]:.1f} %)" for p, label in results.labels.items()}
    note = (
        f"First round whose accuracy reaches the mean of {results.baseline}, given in the heading. Median over seeds "
        '(never reached = infinity); ">" means that at least half of the seeds never reached it.'
    )
    return _by_method("rounds", "Rounds to accuracy", note, results, columns, cell, lower_is_better=True)


def _clients(results: Results) -> Table | None:
    def cell(partition: str, method: str) -> Cell:
        accuracies = [run.client_accuracy for run in results.runs[partition, method]]
        known = [values[np.isfinite(values)] for values in accuracies]
        if any(not len(values) for values in known):
            return Cell("–", math.nan)
        worst = float(np.mean([values.min() for values in known]))
        spread = float(np.mean([values.std() for values in known]))
        return Cell(f"{100 * worst:.2f}", worst, remark=f"σ {100 * spread:.2f}")

    note = (
        "Accuracy of the final global model for the worst client, %; held-out images are weighted by the client's "
        "class shares. σ: standard deviation over clients. Means over seeds."
    )
    return _by_method("clients", "Accuracy by client", note, results, results.labels, cell)


def _domains(results: Results) -> Table | None:
    domains = list(results.all_runs[0].metrics["domain_accuracy"])
    if len(domains) < 2:
        return None

    def cell(domain: str, method: str) -> Cell:
        runs = results.of_method(method)
        mean = float(np.mean([run.metrics["domain_accuracy"].get(domain, math.nan) for run in runs]))
        return Cell(f"{100 * mean:.2f}", mean)

    note = "Accuracy of the final global model on each domain's held-out images, %; means over partitions and seeds."
    return _by_method("domains", "Accuracy by domain", note, results, {name: name for name in domains}, cell)


def _communication(results: Results) -> Table:
    columns = {"down": "down, MB per round", "up": "up, MB per round", "both": "both, MB per run"}

    def cell(column: str, method: str) -> Cell:
        runs = results.of_method(method)
        down, up = (float(np.mean([run.metrics[key] for run in runs])) / 1e6 for key in ("bytes_down", "bytes_up"))
        rounds = float(np.mean([len(run.rounds) for run in runs]))
        value = {"down": down / rounds, "up": up / rounds, "both": down + up}[column]
        return Cell(f"{value:.2f}", value)

    note = "Sent by the server to clients (down) and by clients to the server (up), uncompressed; means over all runs."
    return _by_method("communication", "Communication", note, results, columns, cell, lower_is_better=True)


def _time(results: Results) -> Table:
    columns = {part: f"{part}, s" for part in (*TIME_PARTS, "all")}

    def cell(column: str, method: str) -> Cell:
        seconds = results.seconds(method)
        value = sum(seconds.values()) if column == "all" else seconds[column]
        return Cell(f"{value:.2f}", value)

    hardware = sorted({_hardware(run) for run in results.all_runs})
    note = f"Seconds per run, means over partitions and seeds, on {'; '.join(hardware)}."
    return _by_method("time", "Time", note, results, columns, cell, lower_is_better=True)


_STATISTICS = {
    "emd": "earth mover's distance",
    "jensen_shannon_bits": "Jensen-Shannon, bits",
    "hellinger": "Hellinger",
    "size_cv": "variation of sizes",
    "size_gini": "Gini of sizes",
    "size_max_over_min": "largest over smallest",
}
"""Columns of the table of heterogeneity whose names in partition.json do not read as words."""


def _partitions(results: Results) -> Table:
    names = list(results.all_runs[0].heterogeneity)
    rows = []
    for partition, label in results.labels.items():
        cells = [Cell(label, remark=partition if label != partition else "")]
        for name in names:
            values = [run.heterogeneity[name] for run in results.runs[partition, results.methods[0]]]
            mean = float(np.mean(np.array(values, np.float64)))  # None becomes NaN
            cells.append(Cell(f"{mean:.3g}" if math.isfinite(mean) else "–", mean))
        rows.append(cells)
    note = "How far the clients' label distributions differ; means over seeds. docs/api.md defines each statistic."
    return Table("partitions", "Heterogeneity", note, ["partition", *map(_statistic, names)], rows)


def _statistic(name: str) -> str:
    return _STATISTICS.get(name, name.replace("_", " "))


def _provenance(results: Results) -> Table:
    header = ["run", "accuracy, %", "best round, %", "commit", "data set", "feature set", "torch", "hardware"]
    rows = []
    for run in results.all_runs:
        made, metrics, data = run.settings.provenance, run.metrics, run.settings.dataset
        number, dirty, _ = (made["commit"] or "unknown").partition("-dirty")
        dataset, features = f"{data.name} {(data.hash or '')[:8]}".rstrip(), (run.settings.features or "none")[:8]
        reached = [Cell(f"{100 * metrics[key]:.2f}", metrics[key]) for key in ("mean_last5_accuracy", "best_accuracy")]
        origin = number[:8] + dirty, dataset, features, made["packages"]["torch"], _hardware(run)
        rows.append([Cell(run.name), *reached, *map(Cell, origin)])
    note = "Origin of every number. Each run's folder has more: config.json, rounds.csv, model.safetensors."
    return Table("provenance", "Provenance", note, header, rows)


def _hardware(run: Run) -> str:
    hardware = run.settings.provenance["hardware"]
    return str(hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cores']} cores")


def _by_method(
    name: str,
    title: str,
    note: str,
    results: Results,
    columns: Mapping[str, str],
    cell: Callable[[str, str], Cell],
    lower_is_better: bool = False,
) -> Table:
    """Make a table of one row per method; `columns` maps the names that `cell` receives to headings."""
    rows = [[Cell(method), *(cell(column, method) for column in columns)] for method in results.methods]
    return Table(name, title, note, ["method", *columns.values()], rows, lower_is_better)
