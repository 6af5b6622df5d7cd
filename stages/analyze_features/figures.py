"""The pictures of the analysis: SVG without dates, PNG for maps; equal numbers give equal bytes."""

import io
import os.path
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeline import pictures

_MEASURES = {"probe_accuracy": "linear probe", "purity": "k-means purity", "nmi": "k-means NMI", "ari": "k-means ARI"}
_MARGINS = {"matching_nearest": "matching prompt nearest", "margin": "margin of the matching prompt"}
_MOST_NAMES = 40  # on an axis; more could not be read


@pictures.svg
def bars(scores: dict[str, dict[str, Any]]) -> Figure:
    """SVG: every measure of every layer, side by side (the paper's Fig. 3)."""
    figure = Figure(figsize=(8, 3.6))
    axes = figure.add_subplot(ylim=(0, 1), ylabel="share")
    width = 0.8 / len(scores)
    for number, (layer, found) in enumerate(scores.items()):
        places = np.arange(len(_MEASURES)) + (number - (len(scores) - 1) / 2) * width
        drawn = axes.bar(places, [found[measure] for measure in _MEASURES], width, label=layer)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(_MEASURES)), list(_MEASURES.values()))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@pictures.svg
def scatter(embedded: dict[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str]) -> Figure:
    """SVG: a plane per layer, points float (m, 2) coloured by class (Fig. 2)."""
    figure = Figure(figsize=(3.4 * len(embedded) + 1.2, 3.6))
    panels = figure.subplots(1, len(embedded), squeeze=False)[0]
    colours = matplotlib.colormaps["tab10" if len(class_names) <= 10 else "gist_ncar"](
        np.linspace(0, 1, max(10, len(class_names)))
    )
    for axes, (layer, points) in zip(panels, embedded.items(), strict=True):
        for label in np.unique(labels):
            of_class = points[labels == label]
            axes.scatter(of_class[:, 0], of_class[:, 1], s=6, color=colours[label], label=class_names[label], lw=0)
        axes.set(title=layer, xticks=[], yticks=[])
    if len(class_names) <= _MOST_NAMES:
        panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), markerscale=2)
    return figure


@pictures.svg
def confusion(
    share: np.ndarray, prompts: Sequence[str], margins: Sequence[np.ndarray], class_names: Sequence[str]
) -> Figure:
    """SVG: share (K, prompts) of each class's images nearest to each prompt; and margins (n_k,) of each class."""
    figure = Figure(figsize=(10, 4.6), layout=ConstrainedLayoutEngine(wspace=0.06))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    image = left.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=left, label="share of the class's images")
    shared = os.path.commonprefix(list(prompts))
    left.set(ylabel="class", xlabel=f"nearest prompt: {shared}...", title="which prompt is nearest")
    if len(prompts) <= _MOST_NAMES:
        names = [text.removeprefix(shared) for text in prompts]
        left.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=7)
    if len(class_names) <= _MOST_NAMES:
        left.set_yticks(range(len(class_names)), list(class_names), fontsize=7)
    for place, values in enumerate(margins):
        if len(values):
            low, middle, high = np.percentile(values, [5, 50, 95])
            right.plot([low, high], [place, place], color="tab:blue", lw=2)
            right.plot(middle, place, "o", color="tab:blue", ms=4)
    right.axvline(0, color=pictures.INK, lw=0.8)
    right.set(xlabel="margin", title="margin: median, 5 to 95 %")
    right.grid(axis="x", alpha=0.3)
    return figure


@pictures.svg
def curves(rows: Sequence[dict[str, Any]], recommended: dict[str, Any], chance: dict[str, float]) -> Figure:
    """SVG: every measure against the timestep, a line per layer or set of layers (Fig. 6); the choice is ringed.

    Args:
        rows: of the sweep, each with timestep, layers and the measures; only sets judged at every timestep, and the
            recommended one, are drawn.
        recommended: one of them.
        chance: what features that tell nothing would reach, by measure; a dotted line.
    """
    timesteps = {row["timestep"] for row in rows}
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(" + ".join(row["layers"]), []).append(row)
    chosen = " + ".join(recommended["layers"])
    drawn = {name: line for name, line in lines.items() if name == chosen or len(line) == len(timesteps)}
    measures = _MEASURES | {name: title for name, title in _MARGINS.items() if name in recommended}
    figure = Figure(figsize=(2 * len(measures), 7))
    panels = figure.subplots(2, len(measures) // 2).flat
    for axes, (measure, title) in zip(panels, measures.items(), strict=True):
        for name, line in drawn.items():
            style = "-" if "+" in name else "--"
            axes.plot(
                [row["timestep"] for row in line], [row[measure] for row in line], style, marker="o", ms=3, label=name
            )
        ring = dict(ms=11, mfc="none", color=pictures.INK, label="recommended")
        axes.plot(recommended["timestep"], recommended[measure], "o", **ring)
        if measure in chance:
            axes.axhline(chance[measure], ls=":", lw=1, color="grey", label="chance")
        axes.set(title=title, xlabel="timestep")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def maps(image: np.ndarray, rgb: dict[int, dict[str, np.ndarray]]) -> bytes:
    """PNG: one image's maps, their first three principal components as colours (Fig. 4).

    Args:
        image: uint8 (H, W, 3), shown at the left.
        rgb: timestep -> layer -> uint8 (h, w, 3); a row per layer, a column per timestep.
    """
    layers = list(next(iter(rgb.values())))
    figure = Figure(figsize=(1.5 * (1 + len(rgb)), 1.65 * len(layers)), layout="constrained", dpi=100)
    panels = figure.subplots(len(layers), 1 + len(rgb), squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
    panels[0, 0].imshow(image)
    for column, (timestep, of_layer) in enumerate(rgb.items(), start=1):
        panels[0, column].set_title(f"t = {timestep}", fontsize=9)
        for row, layer in enumerate(layers):
            panels[row, column].imshow(of_layer[layer], interpolation="nearest")
    for row, layer in enumerate(layers):
        panels[row, 1].set_ylabel(layer, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
