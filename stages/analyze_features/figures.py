"""The figures of a cached set, as SVG.

Legends are given handles and names explicitly, because matplotlib would omit names that begin with an underscore.
"""

import os.path
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from pipeline import plotting

MEASURES = {"probe_accuracy": "linear probe", "purity": "k-means purity", "nmi": "k-means NMI", "ari": "k-means ARI"}
_MOST_NUMBERED = 8  # bars of a measure; numbers on more would be illegible
_MOST_NAMES = 40  # on an axis or in a legend
_LONGEST_NAME = 40  # characters
_PANELS_A_ROW = 3
_NOTHING = matplotlib.colors.to_rgba("tab:gray", 0.5)


@plotting.svg
def bars(scores: dict[str, dict[str, Any]], chance: dict[str, float]) -> Figure:
    """Draw every measure of every layer, side by side (the paper's Fig. 3); dotted lines show the chance levels."""
    figure = Figure(figsize=(8, 3.6))
    lowest = min(found[measure] for found in scores.values() for measure in MEASURES)
    axes = figure.add_subplot(ylim=(min(0.0, 1.4 * lowest), 1.05), ylabel="share")
    axes.grid(axis="y")
    width = 0.8 / len(scores)
    legend: dict[str, Any] = {}
    for number, (layer, found) in enumerate(scores.items()):
        places = np.arange(len(MEASURES)) + (number - (len(scores) - 1) / 2) * width
        legend[layer] = axes.bar(places, [found[measure] for measure in MEASURES], width)
        if len(scores) <= _MOST_NUMBERED:
            axes.bar_label(legend[layer], fmt="%.2f", fontsize=7)
    for place, measure in enumerate(MEASURES):
        legend["chance"] = axes.hlines(chance[measure], place - 0.45, place + 0.45, ls=":", color=plotting.INK)
    axes.set_xticks(range(len(MEASURES)), list(MEASURES.values()))
    figure.legend(list(legend.values()), list(legend), fontsize=8, loc="outside right upper")
    return figure


@plotting.svg
def scatter(embedded: dict[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw a panel per layer, at most three in a row, with points float (m, 2) coloured by class (Fig. 2)."""
    columns = min(_PANELS_A_ROW, len(embedded))
    rows = -(-len(embedded) // columns)
    figure = Figure(figsize=(3 * columns + 1.2, 3.2 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    palette = matplotlib.colormaps["tab10" if len(class_names) <= 10 else "gist_rainbow"]
    colours = palette(np.linspace(0, 1, max(10, len(class_names))))
    legend: dict[int, Any] = {}
    for axes, (layer, points) in zip(panels, embedded.items(), strict=False):
        for label in np.unique(labels):
            of_class = points[labels == label]
            legend[label] = axes.scatter(of_class[:, 0], of_class[:, 1], s=6, color=colours[label], lw=0)
        axes.set(title=layer, xticks=[], yticks=[])
    for axes in panels[len(embedded) :]:
        axes.set_axis_off()
    if len(legend) <= _MOST_NAMES:
        names = [_short(class_names[label]) for label in legend]
        figure.legend(list(legend.values()), names, fontsize=7, loc="outside right upper", markerscale=2)
    return figure


@plotting.svg
def confusion(
    share: np.ndarray, prompts: Sequence[str], margins: Sequence[np.ndarray], class_names: Sequence[str]
) -> Figure:
    """Draw the share of each class's images nearest to each prompt, and their margins.

    `share`, float64 (K, prompts), is that of `margins.confusion`; `margins` has (n_k,) for each of the K classes.
    """
    figure = Figure(figsize=(10, 4.6), layout=ConstrainedLayoutEngine(wspace=0.06))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    shades = matplotlib.colormaps["viridis"].with_extremes(bad=_NOTHING)
    figure.colorbar(left.imshow(share, vmin=0, vmax=1, cmap=shades, aspect="auto"), ax=left, label="share of images")
    if np.isnan(share).any():
        figure.legend([Patch(color=_NOTHING)], ["never compared"], fontsize=8, loc="outside lower left")
    shared, names = differing(prompts)
    left.set(ylabel="class", xlabel=f"nearest prompt: {shared}", title="which prompt is nearest")
    if len(prompts) <= _MOST_NAMES:
        upright = max(map(len, names)) <= 2
        left.set_xticks(range(len(names)), map(_short, names), rotation=0 if upright else 90, fontsize=7)
    if len(class_names) <= _MOST_NAMES:
        left.set_yticks(range(len(class_names)), map(_short, class_names), fontsize=7)
    _margins(right, margins)
    return figure


def _margins(axes: Axes, margins: Sequence[np.ndarray]) -> None:
    for place, values in enumerate(margins):
        if len(values):
            low, middle, high = np.percentile(values, [5, 50, 95])
            axes.plot([low, high], [place, place], color="tab:blue", lw=2)
            axes.plot(middle, place, "o", color="tab:blue", ms=4)
    axes.axvline(0, color=plotting.INK, lw=0.8)
    axes.set(xlabel="margin", title="margin: median, 5 to 95 %")
    axes.grid(axis="x")


def differing(prompts: Sequence[str]) -> tuple[str, list[str]]:
    """Return the words that all prompts share at their ends, with "..." between, and the rest of each prompt."""
    words = [text.split(" ") for text in prompts]
    first = min(len(os.path.commonprefix(words)), min(map(len, words)) - 1)
    rest = [own[first:] for own in words]
    last = min(len(os.path.commonprefix([own[::-1] for own in rest])), min(map(len, rest)) - 1)
    shared = [*words[0][:first], "...", *words[0][len(words[0]) - last :]]
    return " ".join(shared), [" ".join(own[: len(own) - last]) for own in rest]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
