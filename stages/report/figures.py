"""The report's figures, as SVG for the page to inline.

Every method has a colour and a dash. The ids of its curve and band end in `curve.<figure>.<method>`; the page's script
shows and hides them by these ids.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline import plotting
from stages.report.results import TIME_PARTS, Results

_COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #8C613C #7A7A7A #B2A800 #6A3D9A".split()
_DASHES = ("solid", "dashed", "dotted")  # as CSS and matplotlib both call them
_MAX_CLASS_NAME = 14  # characters
MOST_POINTS = 300  # clients drawn as points; more are summarised
_MOST_DOTS = 3000  # of clients and classes


@dataclass(frozen=True)
class Pen:
    """Line style of a method."""

    colour: str
    dash: str


def pens(methods: list[str]) -> dict[str, Pen]:
    """Give every method a style: ten colours that colour-blind readers can distinguish; then dashed, then dotted."""
    styles = [Pen(colour, dash) for dash in _DASHES for colour in _COLOURS]
    return dict(zip(methods, itertools.cycle(styles), strict=False))


def curves(results: Results, quantity: str) -> list[str]:
    """Draw accuracy (%) or loss by round, one figure per partition; all have the same axis limits."""
    scale = 100 if quantity == "accuracy" else 1
    if quantity == "accuracy":
        top = min(100.0, 1.05 * max(scale * float(np.max(run.accuracy)) for run in results.all_runs))
    else:  # cut off outliers: where the loss of a few runs explodes, all others would be flat lines
        means = [_stacked(results, *place, quantity).mean(0) for place in results.runs]
        top = 1.1 * float(np.quantile(np.concatenate(means), 0.98))
    return [_curves(results, partition, quantity, scale, top) for partition in results.partitions]


@plotting.svg
def _curves(results: Results, partition: str, quantity: str, scale: int, top: float) -> Figure:
    """Draw the mean over seeds, and a band from the lowest to the highest seed."""
    figure, axes = _axes()
    for method, pen in pens(results.methods).items():
        values = scale * _stacked(results, partition, method, quantity)
        rounds = np.arange(1, values.shape[1] + 1)
        name = f"curve.{quantity}-{partition}.{method}"
        marker = "o" if len(rounds) == 1 else None
        axes.plot(rounds, values.mean(0), color=pen.colour, ls=pen.dash, lw=1.8, gid=name, marker=marker)
        axes.fill_between(rounds, values.min(0), values.max(0), color=pen.colour, alpha=0.15, lw=0, gid=f"band{name}")
    unit = "accuracy, %" if quantity == "accuracy" else "held-out loss"
    axes.set(title=results.labels[partition], xlabel="round", ylabel=unit)
    axes.set_ylim(0, top if top > 0 else None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, 1.03 * len(rounds))
    return figure


def _stacked(results: Results, partition: str, method: str, quantity: str) -> np.ndarray:
    """Return float64 (num_seeds, num_rounds)."""
    return np.stack([getattr(run, quantity) for run in results.runs[partition, method]])


@plotting.svg
def client_spread(results: Results, partition: str) -> Figure:
    """Draw the clients' accuracies for every method, first seed: a point per client, and a bar at their mean.

    More than `MOST_POINTS` clients are drawn as lines from the 5th to the 95th percentile and between the quartiles.
    """
    figure, axes = _axes(height=0.7 + 0.32 * len(results.methods))
    for row, (method, pen) in enumerate(pens(results.methods).items()):
        accuracy = 100 * results.runs[partition, method][0].client_accuracy
        accuracy = accuracy[np.isfinite(accuracy)]
        if len(accuracy) <= MOST_POINTS:
            axes.plot(accuracy, np.full(len(accuracy), row), "o", color=pen.colour, alpha=0.5, ms=6, mew=0)
        else:
            for ends, width in (((5, 95), 2), ((25, 75), 7)):
                ends_at = np.percentile(accuracy, ends)
                axes.plot(ends_at, [row, row], color=pen.colour, alpha=0.5, lw=width, solid_capstyle="butt")
        if len(accuracy):
            axes.plot(2 * [accuracy.mean()], [row - 0.35, row + 0.35], color=pen.colour, lw=2.5)
    axes.set_xlim(-2, 102)
    axes.set(title=results.labels[partition], xlabel="accuracy by client, %", yticks=range(len(results.methods)))
    axes.set_yticklabels(results.methods)
    axes.invert_yaxis()
    return figure


@plotting.svg
def gains(results: Results, partition: str) -> Figure:
    """Draw what guidance adds to each method: a point per seed, their mean, and its 95 % confidence interval."""
    pairs = results.unguided
    figure, axes = _axes(height=0.9 + 0.32 * len(pairs))
    styles = pens(results.methods)
    for row, (method, plain) in enumerate(pairs.items()):
        gain, colour = results.gain(partition, method, plain), styles[method].colour
        axes.plot(
            100 * np.array(gain.by_seed), np.full(len(gain.by_seed), row), "o", color=colour, alpha=0.3, ms=4, mew=0
        )
        half_width = None if gain.half_width is None else 100 * gain.half_width
        axes.errorbar(100 * gain.mean, row, xerr=half_width, fmt="s", color=colour, ms=5, lw=2)
    axes.axvline(0, color=plotting.INK, lw=0.8)
    axes.set(title=results.labels[partition], xlabel="gain by guidance, points", yticks=range(len(pairs)))
    axes.set_yticklabels(list(pairs))
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    return figure


@plotting.svg
def time_split(results: Results) -> Figure:
    """Draw the seconds per run of each method, split into parts."""
    figure, axes = _axes(width=7.5, height=0.9 + 0.32 * len(results.methods))
    left = np.zeros(len(results.methods))
    seconds = [results.seconds(method) for method in results.methods]
    for part, colour in zip(TIME_PARTS, ("#E69F00", "#0072B2", "#CC79A7", "#009E73"), strict=True):
        values = np.array([row[part] for row in seconds])
        axes.barh(results.methods, values, left=left, color=colour, label=part, height=0.6)
        left += values
    axes.set(xlabel="seconds per run")
    axes.invert_yaxis()
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


@plotting.svg
def clients_by_class(results: Results, partition: str, most: int) -> Figure:
    """Draw the samples per client and class as dots, first seed; a dot of `most` samples fills its cell.

    Where there are too many dots, draw a heat map.
    """
    run = results.first_run(partition)
    counts = run.label_counts
    figure, axes = _axes(height=min(9.0, 1.1 + 0.24 * len(counts)))
    clients, classes = np.nonzero(counts)
    if len(clients) <= _MOST_DOTS:
        axes.scatter(classes, clients, s=170 * counts[clients, classes] / most, color="#0072B2", lw=0)
    else:
        plotting.heat_map(axes, counts, "samples")
    shown = list(range(0, counts.shape[1], max(1, counts.shape[1] // 20)))
    axes.set(title=results.labels[partition], xlabel="class", ylabel="client", xticks=shown)
    short = [name if len(name) <= _MAX_CLASS_NAME else f"{name[: _MAX_CLASS_NAME - 1]}…" for name in run.class_names]
    is_unique = len(set(short)) == len(short)
    names = [short[k] if is_unique else str(k) for k in shown]
    axes.set_xticklabels(names, rotation=60 if len("".join(names)) > 30 else 0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(len(counts) - 0.5, -0.5)
    return figure


def _axes(width: float = 4.6, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.grid()
    return figure, axes
