"""The report's tables, and their three forms: HTML (by the page's template), Markdown and LaTeX (booktabs).

A cell is text, with the number it stands for (the page sorts by it), whether it is the best of its column, and a
remark such as the gain over FedAvg.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pipeline import accuracy as accuracy_in_words
from stages.report.results import Results, Run


@dataclass(frozen=True)
class Cell:
    """One cell; `value` is None for text."""

    text: str
    value: float | None = None
    best: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """A titled table; the first column names the row."""

    name: str
    title: str
    note: str
    header: list[str]
    rows: list[list[Cell]] = field(default_factory=list)


def make(results: Results) -> list[Table]:
    """Every table that the runs have something for."""
    tables = [accuracy(results), _linear_probe(results), _rounds_to_baseline(results)]
    tables += [_clients(results), _domains(results)]
    tables += [_communication(results), _time(results), _partitions(results), _provenance(results)]
    return [table for table in tables if table]


def accuracy(results: Results) -> Table:
    """The paper's layout: methods by settings, mean ± deviation over seeds, the best in bold, gains over FedAvg."""
    columns = [*results.partitions, "mean"] if len(results.partitions) > 1 else results.partitions
    by_seed = {
        (column, method): results.mean_accuracies(method) if column == "mean" else results.accuracies(column, method)
        for column in columns
        for method in results.methods
    }
    means = {place: statistics.fmean(values) for place, values in by_seed.items()}
    best = {column: max(means[column, method] for method in results.methods) for column in columns}

    def cell(column: str, method: str) -> Cell:
        mean, text = means[column, method], accuracy_in_words.in_percent(by_seed[column, method])
        is_best = mean == best[column] and len(results.methods) > 1
        if results.baseline in (None, method):
            return Cell(text, mean, is_best)
        gain = 100 * (mean - means[column, str(results.baseline)])
        return Cell(text, mean, is_best, f"{gain:+.2f}".replace("-", "\u2212"))

    last = min(5, *(len(run.accuracy) for run in results.all_runs))
    of = f"mean of the last {last} rounds" if last > 1 else "after the only round"
    over = (
        f"mean ± standard deviation over {len(results.seeds)} seeds" if len(results.seeds) > 1 else "one seed (n = 1)"
    )
    note = f"{measure(results)}, %, {of}; {over}. Best in bold"
    note += f"; small: the gain over {results.baseline}." if results.baseline else "."
    return _by_method("accuracy", "Accuracy", note, results, columns, cell)


def measure(results: Results) -> str:
    """What the accuracies are accuracies of."""
    kinds = {
        "k-NN classifier on the global model's embeddings"
        if "knn_neighbours" in run.config["method"]
        else "Global model"
        for run in results.all_runs
    }
    held_out = {"test": "the test images", "validation": "the validation images"}
    on = held_out[results.all_runs[0].config["train_fl"]["evaluate_on"]]
    return f"{' or '.join(sorted(kinds))} on {on}"


def _linear_probe(results: Results) -> Table | None:
    """Of methods without labels, whose accuracy is a k-NN classifier's; the others have no such number."""

    def probes(partition: str, method: str) -> list[float]:
        found = [run.metrics.get("linear_probe_accuracy") for run in results.runs[partition, method]]
        return [value for value in found if value is not None]

    def cell(partition: str, method: str) -> Cell:
        values = probes(partition, method)
        if not values:
            return Cell("–", math.nan)
        mean = statistics.fmean(values)
        return Cell(accuracy_in_words.in_percent(values), mean, len(known[partition]) > 1 and mean == best[partition])

    means = {place: statistics.fmean(values) for place in results.runs if (values := probes(*place))}
    if not means:
        return None
    known = {p: [mean for (partition, _), mean in means.items() if partition == p] for p in results.partitions}
    best = {partition: max(values, default=math.nan) for partition, values in known.items()}
    note = (
        "A linear classifier on the last global model's frozen embeddings, fitted on all clients' training images with "
        "their labels, %; methods without labels only. Best in bold."
    )
    return _by_method("probe", "Linear probe", note, results, results.partitions, cell)


def _rounds_to_baseline(results: Results) -> Table | None:
    if results.baseline is None or len(results.methods) < 2:
        return None
    targets = {p: statistics.fmean(results.accuracies(p, results.baseline)) for p in results.partitions}

    def cell(partition: str, method: str) -> Cell:
        rounds = results.rounds_to(partition, method, targets[partition])
        reached = [number for number in rounds if number is not None]
        if not reached:
            return Cell("never", math.inf)
        remark = "" if len(reached) == len(rounds) else f"{len(reached)} of {len(rounds)} seeds"
        return Cell(f"{np.mean(reached):.1f}", float(np.mean(reached)), remark=remark)

    header = [f"{p} ({100 * targets[p]:.1f} %)" for p in results.partitions]
    note = f"First round that reaches {results.baseline}'s accuracy (given above each column), mean over seeds."
    table = _by_method("rounds", "Rounds to accuracy", note, results, results.partitions, cell)
    return Table(table.name, table.title, table.note, ["method", *header], table.rows)


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
        "The last global model's accuracy for the worst client, %, where a client weighs the held-out images by its "
        "own classes; small: the standard deviation over clients. Means over seeds."
    )
    return _by_method("clients", "Accuracy by client", note, results, results.partitions, cell)


def _domains(results: Results) -> Table | None:
    domains = list(results.all_runs[0].metrics["domain_accuracy"])
    if len(domains) < 2:
        return None

    def cell(domain: str, method: str) -> Cell:
        runs = [run for partition in results.partitions for run in results.runs[partition, method]]
        mean = float(np.mean([run.metrics["domain_accuracy"].get(domain, math.nan) for run in runs]))
        return Cell(f"{100 * mean:.2f}", mean)

    note = "The last global model's accuracy on each domain's held-out images, %, mean over settings and seeds."
    return _by_method("domains", "Accuracy by domain", note, results, domains, cell)


def _communication(results: Results) -> Table:
    columns = ["down, MB a round", "up, MB a round", "both, MB a run"]

    def cell(column: str, method: str) -> Cell:
        runs = [run for partition in results.partitions for run in results.runs[partition, method]]
        down, up = (float(np.mean([run.metrics[key] for run in runs])) / 1e6 for key in ("bytes_down", "bytes_up"))
        rounds = float(np.mean([len(run.accuracy) for run in runs]))
        value = {columns[0]: down / rounds, columns[1]: up / rounds, columns[2]: down + up}[column]
        return Cell(f"{value:.2f}", value)

    note = "What the server sends to its clients (down) and they send back (up), uncompressed; means over settings."
    return _by_method("communication", "Bytes sent", note, results, columns, cell)


def _time(results: Results) -> Table:
    columns = ["load, s", "train, s", "aggregate, s", "evaluate, s", "all, s"]

    def cell(column: str, method: str) -> Cell:
        seconds = results.seconds(method)
        value = sum(seconds.values()) if column == "all, s" else seconds[column.partition(",")[0]]
        return Cell(f"{value:.2f}", value)

    hardware = sorted({_hardware(run) for run in results.all_runs})
    note = f"Seconds a run, mean over settings and seeds, on {'; '.join(hardware)}."
    return _by_method("time", "Time", note, results, columns, cell)


def _partitions(results: Results) -> Table:
    names = list(results.all_runs[0].heterogeneity)
    rows = []
    for partition in results.partitions:
        runs = results.runs[partition, results.methods[0]]
        cells = [Cell(partition)]
        for name in names:
            values = [run.heterogeneity[name] for run in runs]
            known = [value for value in values if value is not None]
            mean = float(np.mean(known)) if len(known) == len(values) else math.nan
            cells.append(Cell(f"{mean:.3g}" if math.isfinite(mean) else "–", mean))
        rows.append(cells)
    note = "How far the clients' label distributions lie apart; means over seeds. docs/api.md defines each number."
    return Table("partitions", "Heterogeneity", note, ["setting", *(name.replace("_", " ") for name in names)], rows)


def _provenance(results: Results) -> Table:
    header = ["run", "accuracy, %", "best round, %", "commit", "data set", "feature set", "torch", "hardware"]
    rows = []
    for run in results.all_runs:
        made, metrics, data = run.config["provenance"], run.metrics, run.config["dataset"]
        features = run.config["features"]
        rows.append(
            [
                Cell(run.name),
                Cell(f"{100 * metrics['mean_last5_accuracy']:.2f}", metrics["mean_last5_accuracy"]),
                Cell(f"{100 * metrics['best_accuracy']:.2f}", metrics["best_accuracy"]),
                Cell(_short_commit(made["commit"])),
                Cell(f"{data['name']} {data['hash'][:8]}"),
                Cell(features[:8] if features else "none"),
                Cell(made["packages"]["torch"]),
                Cell(_hardware(run)),
            ]
        )
    note = "Where every number comes from. The run's folder holds the rest: config.json, rounds.csv, model.safetensors."
    return Table("provenance", "Provenance", note, header, rows)


def _hardware(run: Run) -> str:
    hardware = run.config["provenance"]["hardware"]
    return str(hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cores']} cores")


def _short_commit(commit: str | None) -> str:
    if not commit:
        return "unknown"
    number, dirty, _ = commit.partition("-dirty")
    return number[:8] + dirty


def _by_method(
    name: str, title: str, note: str, results: Results, columns: list[str], cell: Callable[[str, str], Cell]
) -> Table:
    rows = [[Cell(method), *(cell(column, method) for column in columns)] for method in results.methods]
    return Table(name, title, note, ["method", *columns], rows)


def to_markdown(table: Table) -> str:
    """A pipe table under its title."""
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)]]
    lines += [[_marked(cell, "**{}**", " ({})").replace("|", "\\|") for cell in row] for row in table.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {table.title}\n\n{table.note}\n\n{body}\n"


def to_latex(table: Table) -> str:
    r"""A table environment for booktabs, captioned with its note."""
    header = " & ".join(_latex(text) for text in table.header)
    rows = [" & ".join(_latex(_marked(cell, "\\textbf{{{}}}", " ({})")) for cell in row) for row in table.rows]
    lines = [
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{_latex(table.note)}}}",
        f"  \\label{{tab:{table.name}}}",
        f"  \\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        "    \\toprule",
        f"    {header} \\\\",
        "    \\midrule",
        *(f"    {row} \\\\" for row in rows),
        "    \\bottomrule",
        "  \\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _marked(cell: Cell, bold: str, remark: str) -> str:
    text = bold.format(cell.text) if cell.best else cell.text
    return text + (remark.format(cell.remark) if cell.remark else "")


def _latex(text: str) -> str:
    for character in "&%#_":
        text = text.replace(character, f"\\{character}")
    for character, command in (("±", "$\\pm$"), ("\u2212", "$-$"), ("σ", "$\\sigma$"), ("–", "--")):
        text = text.replace(character, command)
    return text
