"""The report's tables, and their three forms: HTML (by the page's template), Markdown and LaTeX (booktabs).

A cell is text, with the number it stands for (the page sorts by it), whether it is the best of its column, and a
remark such as the gain over FedAvg.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline import accuracy as accuracy_in_words
from stages.report.results import TIME_PARTS, Results, Run


@dataclass(frozen=True)
class Cell:
    """One cell; `value` is None for text."""

    text: str
    value: float | None = None
    best: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """A titled table; the first column names the row. `lower_is_better` says which end a reader wants on top."""

    name: str
    title: str
    note: str
    header: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    lower_is_better: bool = False


def make(results: Results) -> list[Table]:
    """Every table that the runs have something for."""
    tables = [accuracy(results), _linear_probe(results), _rounds_to_baseline(results)]
    tables += [_clients(results), _domains(results)]
    tables += [_communication(results), _time(results), _partitions(results), _provenance(results)]
    return [table for table in tables if table]


def accuracy(results: Results) -> Table:
    """The paper's layout: methods by settings, mean ± deviation over seeds, the best in bold, gains over FedAvg.

    Gains and the best are among what is measured alike: a k-NN classifier's accuracy is not compared with a
    classifier's own.
    """
    columns = results.labels | ({"mean": "mean"} if len(results.partitions) > 1 else {})
    by_seed = {
        (column, method): results.mean_accuracies(method) if column == "mean" else results.accuracies(column, method)
        for column in columns
        for method in results.methods
    }

    def cell(column: str, method: str) -> Cell:
        own = by_seed[column, method]
        alike = results.measured_like(method)
        is_best = _is_best(own, [by_seed[column, other] for other in alike])
        compared = results.baseline in alike and results.baseline != method
        gain = _gain(own, by_seed[column, str(results.baseline)]) if compared else ""
        return Cell(accuracy_in_words.in_percent(own), statistics.fmean(own), is_best, gain)

    last = min(5, *(len(run.accuracy) for run in results.all_runs))
    of = f"mean of the last {last} rounds" if last > 1 else "after the only round"
    over = (
        f"mean ± standard deviation over {len(results.seeds)} seeds" if len(results.seeds) > 1 else "one seed (n = 1)"
    )
    note = f"{measure(results)}, %, {of}; {over}"
    note += ". Best in bold" if len(results.methods) > 1 else ""
    if results.baseline and len(results.methods) > 1:
        note += f"; small or in brackets: the gain over {results.baseline}"
        note += ", seed by seed, and its deviation" if len(results.seeds) > 1 else ""
    return _by_method("accuracy", "Accuracy", f"{note}.", results, columns, cell)


def _is_best(own: list[float], of: list[list[float]]) -> bool:
    """Whether no other's mean is higher, as far as two decimals of a percent show."""
    return len(of) > 1 and f"{statistics.fmean(own):.4f}" == f"{max(map(statistics.fmean, of)):.4f}"


def _gain(own: list[float], baseline: list[float]) -> str:
    """Points, of seeds in pairs, which share their partition and their initial weights."""
    gains = [one - other for one, other in zip(own, baseline, strict=True)]
    mean, spread = round(100 * statistics.fmean(gains), 2) + 0.0, accuracy_in_words.deviation(gains)
    return (f"{mean:+.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")).replace("-", "\u2212")


def measure(results: Results) -> str:
    """What the accuracies are accuracies of."""
    runs = results.all_runs
    on = {"test": "the test images", "validation": "the validation images"}[runs[0].config["train_fl"]["evaluate_on"]]
    neighbours = list(dict.fromkeys(run.method for run in runs if run.judged_by_neighbours))
    if not neighbours:
        return f"Global model on {on}"
    by_neighbours = f"k-NN classifier on the global model's embeddings of {on}"
    if len(neighbours) == len(results.methods):
        return by_neighbours
    return f"Global model on {on} ({', '.join(neighbours)}: {by_neighbours}, not compared with the others)"


def _linear_probe(results: Results) -> Table | None:
    """Of methods without labels, whose accuracy is a k-NN classifier's; the others have no such number."""

    def probes(partition: str, method: str) -> list[float]:
        found = [run.metrics.get("linear_probe_accuracy") for run in results.runs[partition, method]]
        return [value for value in found if value is not None]

    def cell(partition: str, method: str) -> Cell:
        if not (own := probes(partition, method)):
            return Cell("–", math.nan)
        known = [values for other in results.methods if (values := probes(partition, other))]
        return Cell(accuracy_in_words.in_percent(own), statistics.fmean(own), _is_best(own, known))

    if not any(probes(*place) for place in results.runs):
        return None
    note = (
        "A linear classifier on the last global model's frozen embeddings, fitted on all clients' training images with "
        "their labels, %; methods without labels only. Best in bold."
    )
    return _by_method("probe", "Linear probe", note, results, results.labels, cell)


def _rounds_to_baseline(results: Results) -> Table | None:
    if results.baseline is None or len(results.methods) < 2:
        return None
    targets = {p: statistics.fmean(results.accuracies(p, results.baseline)) for p in results.partitions}

    def cell(partition: str, method: str) -> Cell:
        if results.baseline not in results.measured_like(method):
            return Cell("–", math.nan)
        rounds = results.rounds_to(partition, method, targets[partition])
        reached = sum(map(math.isfinite, rounds))
        remark = f"{reached} of {len(rounds)} seeds" if 0 < reached < len(rounds) else ""
        median = statistics.median(rounds)
        later = f"> {len(results.runs[partition, method][0].accuracy)}" if reached else "never"
        return Cell(f"{median:g}" if math.isfinite(median) else later, median, remark=remark)

    columns = {p: f"{label} ({100 * targets[p]:.1f} %)" for p, label in results.labels.items()}
    note = (
        f"First round that reaches {results.baseline}'s accuracy (its mean, given above each column; a single round "
        "counts). Median over seeds, where a seed that never does comes last; > where more than half do not."
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
        "The last global model's accuracy for the worst client, %, where a client weighs the held-out images by its "
        "own classes; σ: the standard deviation over clients. Means over seeds."
    )
    return _by_method("clients", "Accuracy by client", note, results, results.labels, cell)


def _domains(results: Results) -> Table | None:
    domains = list(results.all_runs[0].metrics["domain_accuracy"])
    if len(domains) < 2:
        return None

    def cell(domain: str, method: str) -> Cell:
        runs = [run for partition in results.partitions for run in results.runs[partition, method]]
        mean = float(np.mean([run.metrics["domain_accuracy"].get(domain, math.nan) for run in runs]))
        return Cell(f"{100 * mean:.2f}", mean)

    note = "The last global model's accuracy on each domain's held-out images, %, mean over settings and seeds."
    return _by_method("domains", "Accuracy by domain", note, results, {name: name for name in domains}, cell)


def _communication(results: Results) -> Table:
    columns = {"down": "down, MB a round", "up": "up, MB a round", "both": "both, MB a run"}

    def cell(column: str, method: str) -> Cell:
        runs = [run for partition in results.partitions for run in results.runs[partition, method]]
        down, up = (float(np.mean([run.metrics[key] for run in runs])) / 1e6 for key in ("bytes_down", "bytes_up"))
        rounds = float(np.mean([len(run.accuracy) for run in runs]))
        value = {"down": down / rounds, "up": up / rounds, "both": down + up}[column]
        return Cell(f"{value:.2f}", value)

    note = "What the server sends to its clients (down) and they send back (up), uncompressed; means over settings."
    return _by_method("communication", "Bytes sent", note, results, columns, cell, lower_is_better=True)


def _time(results: Results) -> Table:
    columns = {part: f"{part}, s" for part in (*TIME_PARTS, "all")}

    def cell(column: str, method: str) -> Cell:
        seconds = results.seconds(method)
        value = sum(seconds.values()) if column == "all" else seconds[column]
        return Cell(f"{value:.2f}", value)

    hardware = sorted({_hardware(run) for run in results.all_runs})
    note = f"Seconds a run, mean over settings and seeds, on {'; '.join(hardware)}."
    return _by_method("time", "Time", note, results, columns, cell, lower_is_better=True)


def _partitions(results: Results) -> Table:
    names = list(results.all_runs[0].heterogeneity)
    rows = []
    for partition in results.partitions:
        runs = results.runs[partition, results.methods[0]]
        label = results.labels[partition]
        cells = [Cell(label, remark=partition if label != partition else "")]
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
    name: str,
    title: str,
    note: str,
    results: Results,
    columns: Mapping[str, str],
    cell: Callable[[str, str], Cell],
    lower_is_better: bool = False,
) -> Table:
    """A row a method; `columns`: what `cell` takes -> what the reader sees."""
    rows = [[Cell(method), *(cell(column, method) for column in columns)] for method in results.methods]
    return Table(name, title, note, ["method", *columns.values()], rows, lower_is_better)


def to_markdown(table: Table) -> str:
    """A pipe table under its title."""
    header = [_cell_of_pipe_table(text) for text in table.header]
    lines = [header, ["---" if text else "---:" for text in _holds_text(table)]]
    lines += [[_cell_of_pipe_table(_marked(cell, "**{}**", " ({})")) for cell in row] for row in table.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {table.title}\n\n{table.note}\n\n{body}\n"


def _cell_of_pipe_table(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def to_latex(table: Table) -> str:
    r"""A table environment for booktabs and graphicx, captioned with its title and note, no wider than the text."""
    header = " & ".join(map(_latex, table.header))
    rows = [" & ".join(_marked(_escaped(cell), "\\textbf{{{}}}", " ({})") for cell in row) for row in table.rows]
    columns = "".join("l" if text else "r" for text in _holds_text(table))
    lines = [
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{\\textbf{{{_latex(table.title)}.}} {_latex(table.note)}}}",
        f"  \\label{{tab:{table.name}}}",
        "  \\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
        f"  \\begin{{tabular}}{{{columns}}}",
        "    \\toprule",
        f"    {header} \\\\",
        "    \\midrule",
        *(f"    {row} \\\\" for row in rows),
        "    \\bottomrule",
        "  \\end{tabular}}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _holds_text(table: Table) -> list[bool]:
    """Of each column whether it stands to the left: no cell of it is a number."""
    return [all(cell.value is None for cell in column) for column in zip(*table.rows, strict=True)]


def _marked(cell: Cell, bold: str, remark: str) -> str:
    text = bold.format(cell.text) if cell.best else cell.text
    return text + (remark.format(cell.remark) if cell.remark else "")


def _escaped(cell: Cell) -> Cell:
    return replace(cell, text=_latex(cell.text), remark=_latex(cell.remark))


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%#_{}$"}
    | {"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}"}
    | {"±": "$\\pm$", "\u2212": "$-$", "σ": "$\\sigma$", "–": "--", "<": "$<$", ">": "$>$", "|": "$|$"}
)


def _latex(text: str) -> str:
    return text.translate(_LATEX)
