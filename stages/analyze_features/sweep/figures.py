"""The pictures of a sweep: curves as SVG, maps as PNG; as readable with thirty layers as with four.

Curves are drawn by role. Single layers are thin, from blue to green in the model's order. Of the fusions, whose best
two or three are others at every timestep, three sets are thick: what is recommended, the backbone's own, all layers.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from pipeline import plotting
from stages.analyze_features.figures import MEASURES

_MARGINS = {"matching_nearest": "matching prompt nearest", "margin": "margin of the matching prompt"}
_ERRORS = {"probe_accuracy": "probe_error", "matching_nearest": "nearest_error"}
_MOST_NAMED = 8  # single layers in the legend; for more there is a key of colours
_MOST_PARTS = 4  # of a set's name
_MOST_IN_TWO_COLUMNS = 60  # characters of a legend's entry
_TALLEST = 16.0  # inches of all rows of maps

Row = dict[str, Any]


@plotting.svg
def curves(rows: Sequence[Row], recommended: Row, own_layers: Sequence[str], chance: dict[str, float]) -> Figure:
    """SVG: every measure against the timestep (the paper's Fig. 6); the choice is ringed.

    Args:
        rows: of the sweep, each with timestep, layers and the measures.
        recommended: one of them; one standard error to either side of its line is shaded.
        own_layers: those that "auto" stands for.
        chance: what features that tell nothing would reach, by measure; a dotted line.
    """
    order = list(dict.fromkeys(row["layers"][0] for row in rows if len(row["layers"]) == 1))
    shades = matplotlib.colormaps["viridis"](np.linspace(0.35, 0.8, len(order)))
    measures = MEASURES | {name: title for name, title in _MARGINS.items() if name in recommended}
    figure = Figure(figsize=(1.8 * len(measures), 7))
    panels = figure.subplots(2, len(measures) // 2).flatten()
    legend: dict[str, Artist] = {}
    for axes, (measure, title) in zip(panels, measures.items(), strict=True):
        axes.set(title=title, xlabel="timestep")
        axes.grid()
        alone = {
            layer: _line(axes, rows, [layer], measure, color=of, lw=1, ms=2)
            for layer, of in zip(order, shades, strict=True)
        }
        legend |= alone if len(order) <= _MOST_NAMED else {}
        for name, (layers, colour) in _thick(recommended["layers"], own_layers, order).items():
            legend[name] = _line(axes, rows, layers, measure, color=colour, lw=2.2, ms=4)
        if measure in _ERRORS:
            legend["± one standard error of the recommended"] = _band(axes, rows, recommended["layers"], measure)
        (ring,) = axes.plot(recommended["timestep"], recommended[measure], "o", ms=11, mfc="none", color=plotting.INK)
        legend["recommended timestep"] = ring
        if measure in chance:
            legend["chance"] = axes.axhline(chance[measure], ls=":", color=plotting.INK)
    if len(order) > _MOST_NAMED:
        _key_of_colours(figure, panels, order, shades)
    columns = 1 if max(map(len, legend)) > _MOST_IN_TWO_COLUMNS else 2
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def _key_of_colours(figure: Figure, panels: np.ndarray, order: Sequence[str], shades: np.ndarray) -> None:
    shown = ScalarMappable(Normalize(0, len(order) - 1), ListedColormap(shades))
    key = figure.colorbar(shown, ax=panels, location="top", aspect=60, shrink=0.5, ticks=[0, len(order) - 1])
    key.ax.set_xticklabels([order[0], order[-1]])
    key.set_label(f"thin lines: {len(order)} single layers")


@plotting.png
def maps(image: np.ndarray, rgb: dict[int, dict[str, np.ndarray]]) -> Figure:
    """PNG: one image's maps, their first three principal components as colours (Fig. 4).

    Args:
        image: uint8 (H, W, 3), shown at the left.
        rgb: timestep -> layer -> uint8 (h, w, 3); a row per layer, a column per timestep.
    """
    layers = list(next(iter(rgb.values())))
    height = min(1.65 * len(layers), _TALLEST)
    figure = Figure(figsize=(1.5 * (1 + len(rgb)), height + 0.4), layout="constrained", dpi=100)
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
        panels[row, 1].set_ylabel(layer, fontsize=8, rotation=0, ha="right", va="center")
    figure.supxlabel(
        "Three principal components of each layer at each timestep; signs are matched along a row, axes are not: "
        "colours compare roughly there, and not at all between rows.",
        fontsize=8,
        wrap=True,
    )
    return figure


def with_signs_matched(colours: Sequence[np.ndarray]) -> list[np.ndarray]:
    """One layer's maps by timestep, each component turned round where it runs against the timestep before.

    A principal component's sign is arbitrary; turned round, its colour c is 255 - c.

    Args:
        colours: uint8 (p, h, w, 3) a timestep, of the same p images.
    """
    matched = list(colours[:1])
    for own in colours[1:]:
        before, now = (_centred(maps) for maps in (matched[-1], own))
        against = (before * now).sum(0) < 0  # (3,)
        matched.append(np.where(against, 255 - own, own))
    return matched


def in_words(layers: Sequence[str], order: Sequence[str]) -> str:
    """A set of layers, three or more consecutive ones as a range: "a.0 to a.2 (3) + a.5".

    Args:
        layers: some of `order`, in that order.
        order: all layers, as in the model.
    """
    places = [order.index(layer) for layer in layers]
    starts = [0, *(at for at, (one, other) in enumerate(pairwise(places), start=1) if other != one + 1), len(places)]
    parts = [part for start, stop in pairwise(starts) for part in _run(layers[start:stop])]
    if len(parts) <= _MOST_PARTS:
        return " + ".join(parts)
    return f"{' + '.join(parts[: _MOST_PARTS - 2])} + ... + {parts[-1]} ({len(layers)} layers)"


def _run(consecutive: Sequence[str]) -> list[str]:
    if len(consecutive) < 3:
        return list(consecutive)
    return [f"{consecutive[0]} to {consecutive[-1]} ({len(consecutive)})"]


def _thick(
    recommended: Sequence[str], own: Sequence[str], order: Sequence[str]
) -> dict[str, tuple[Sequence[str], str]]:
    """Legend -> layers and colour of the sets with a thick line, the recommended last, over the others."""
    roles = {"all layers": order, "the backbone's own": own, "recommended": recommended}
    colours = ("tab:purple", "tab:orange", plotting.INK)
    named: dict[tuple[str, ...], tuple[list[str], str]] = {}
    for (role, layers), colour in zip(roles.items(), colours, strict=True):
        names, _ = named.pop(tuple(layers), ([], colour))
        named[tuple(layers)] = ([*names, role], colour)
    return {
        f"{', '.join(names)}: {in_words(layers, order)}": (layers, colour) for layers, (names, colour) in named.items()
    }


def _line(axes: Axes, rows: Sequence[Row], layers: Sequence[str], measure: str, **style: Any) -> Artist:
    points = [(row["timestep"], row[measure]) for row in rows if row["layers"] == list(layers)]
    (line,) = axes.plot(*zip(*points, strict=True), marker="o", **style)
    return line


def _band(axes: Axes, rows: Sequence[Row], layers: Sequence[str], measure: str) -> Artist:
    of_set = [row for row in rows if row["layers"] == list(layers)]
    value, error = (np.array([row[name] for row in of_set]) for name in (measure, _ERRORS[measure]))
    timesteps = [row["timestep"] for row in of_set]
    return axes.fill_between(timesteps, value - error, value + error, color=plotting.INK, alpha=0.15, lw=0)


def _centred(maps: np.ndarray) -> np.ndarray:
    """uint8 (p, h, w, 3) -> float64 (p * h * w, 3)."""
    flat = maps.reshape(-1, maps.shape[-1]).astype(np.float64)
    return flat - flat.mean(0)
