"""The report's pictures: SVG by matplotlib, in the page's own text colour and font.

A method's curve and band bear the id `curve.<figure>.<method>`, by which the page switches them on and off. Equal
results give equal bytes.
"""

import textwrap
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from pipeline import pictures  # noqa: E402
from stages.report.results import TIME_PARTS, Results, Run  # noqa: E402

_INK = "#010203"
"""Stands for the page's text colour, which differs between light and dark."""
_STYLE: Any = {
    "svg.hashsalt": "feddifrc",
    "svg.fonttype": "none",
    "savefig.transparent": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick", "grid")},
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
}


def colours(methods: list[str]) -> dict[str, str]:
    """A colour a method, told apart by the colour-blind as far as ten go."""
    ten = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C613C", "#7A7A7A", "#B2A800", "#6A3D9A"]
    return {method: ten[number % len(ten)] for number, method in enumerate(methods)}


def curves(results: Results, quantity: str) -> dict[str, str]:
    """Per partition the accuracy (%) or loss by round: mean over seeds, and the band from lowest to highest seed."""
    scale = 100 if quantity == "accuracy" else 1
    figures = {}
    top = max(scale * float(np.max(getattr(run, quantity))) for run in results.all_runs)
    for partition in results.partitions:
        figure, axes = _axes()
        for method, colour in colours(results.methods).items():
            values = scale * np.stack([getattr(run, quantity) for run in results.runs[partition, method]])
            rounds = np.arange(1, values.shape[1] + 1)
            name = f"curve.{quantity}-{partition}.{method}"
            axes.plot(rounds, values.mean(0), color=colour, lw=1.8, gid=name, marker="o" if len(rounds) == 1 else None)
            axes.fill_between(rounds, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0, gid=f"band{name}")
        unit = "accuracy, %" if quantity == "accuracy" else "held-out loss"
        axes.set(title=partition, xlabel="round", ylabel=unit)
        if quantity == "accuracy":
            axes.set_ylim(0, min(100, 1.05 * top))
        figures[partition] = _svg(figure)
    return figures


def client_spread(results: Results) -> dict[str, str]:
    """Per partition the clients' accuracies under every method, first seed: points, and a bar at their mean."""
    figures = {}
    for partition in results.partitions:
        figure, axes = _axes(height=0.7 + 0.32 * len(results.methods))
        for row, (method, colour) in enumerate(colours(results.methods).items()):
            accuracy = 100 * results.runs[partition, method][0].client_accuracy
            accuracy = accuracy[np.isfinite(accuracy)]
            axes.plot(accuracy, np.full(len(accuracy), row), "o", color=colour, alpha=0.5, ms=6, mew=0)
            if len(accuracy):
                axes.plot(2 * [accuracy.mean()], [row - 0.35, row + 0.35], color=colour, lw=2.5)
        axes.set(title=partition, xlabel="accuracy by client, %", yticks=range(len(results.methods)))
        axes.set_yticklabels(results.methods)
        axes.invert_yaxis()
        figures[partition] = _svg(figure)
    return figures


def time_split(results: Results) -> str:
    """Seconds a run by part, methods below one another."""
    figure, axes = _axes(width=7.5, height=0.9 + 0.32 * len(results.methods))
    left = np.zeros(len(results.methods))
    seconds = [results.seconds(method) for method in results.methods]
    for part, colour in zip(TIME_PARTS, ("#E69F00", "#0072B2", "#CC79A7", "#009E73"), strict=True):
        values = np.array([row[part] for row in seconds])
        axes.barh(results.methods, values, left=left, color=colour, label=part, height=0.6)
        left += values
    axes.set(xlabel="seconds a run")
    axes.invert_yaxis()
    axes.legend(ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    return _svg(figure)


def clients_by_class(run: Run) -> str:
    """Clients x classes: samples as the area of a dot."""
    counts = run.label_counts
    figure, axes = _axes(height=min(9.0, 1.1 + 0.24 * len(counts)))
    clients, classes = np.nonzero(counts)
    sizes = counts[clients, classes]
    axes.scatter(classes, clients, s=170 * sizes / sizes.max(), color="#0072B2", lw=0)
    shown = list(range(0, counts.shape[1], max(1, counts.shape[1] // 20)))
    axes.set(title=run.partition, xlabel="class", ylabel="client", xticks=shown)
    names = [textwrap.shorten(run.class_names[k], 14, placeholder="…") for k in shown]
    axes.set_xticklabels(
        names if len(set(names)) == len(names) else [str(k) for k in shown],
        rotation=60 if len("".join(names)) > 30 else 0,
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    return _svg(figure)


def _axes(width: float = 4.6, height: float = 3.2) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """Inline SVG with stable ids and no date, its text in the page's colour and font, sized by the page."""
    text = pictures.svg(figure, _STYLE)
    return text[text.index("<svg") :].replace(_INK, "currentColor")
