"""The figures of a sweep: curves as SVG, maps as PNG; as readable with thirty layers as with four.

Single layers have thin curves, from blue to green in the model's order. Three fusions have thick ones: the recommended
layers, those that "auto" selects, and all. The best two or three layers differ between timesteps and are not drawn.
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
    """Draw every measure in the rows of the sweep's table against the timestep (the paper's Fig. 6).

    The recommended row is circled, and one standard error around its line is shaded. `own_layers` are those that "auto"
    selects; the chance level of a measure is a dotted line.
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
    """Draw an image, uint8 (H, W, 3), and its maps as colours, uint8 (h, w, 3), by timestep and layer (Fig. 4)."""
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
    caption = (
        "Three principal components of each layer at each timestep; signs are matched along a row, axes are not: "
        "colours compare roughly there, and not at all between rows."
    )
    figure.supxlabel(caption, fontsize=8, wrap=True)
    return figure


def with_signs_matched(colours: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Match the signs of principal components, which are arbitrary, to those of the preceding timestep.

    `colours` has uint8 (p, h, w, 3) per timestep, one layer's maps of the same p images. An inverted colour is 255 - c.
    """
    matched = list(colours[:1])
    for own in colours[1:]:
        before, now = (_centred(maps) for maps in (matched[-1], own))
        against = (before * now).sum(0) < 0  # (3,)
        matched.append(np.where(against, 255 - own, own))
    return matched


def in_words(layers: Sequence[str], order: Sequence[str]) -> str:
    """Name a set of layers, with ranges for three or more that are consecutive in `order`: "a.0 to a.2 (3) + a.5"."""
    places = [order.index(layer) for layer in layers]
    starts = [0, *(at for at, (one, other) in enumerate(pairwise(places), start=1) if other != one + 1), len(places)]
    parts: list[str] = []
    for start, stop in pairwise(starts):
        run = f"{layers[start]} to {layers[stop - 1]} ({stop - start})"
        parts += [run] if stop - start > 2 else layers[start:stop]
    if len(parts) <= _MOST_PARTS:
        return " + ".join(parts)
    return f"{' + '.join(parts[: _MOST_PARTS - 2])} + ... + {parts[-1]} ({len(layers)} layers)"


def _thick(
    recommended: Sequence[str], own: Sequence[str], order: Sequence[str]
) -> dict[str, tuple[Sequence[str], str]]:
    """Return layers and colour of the thick curves by their name in the legend, the recommended last, on top."""
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
    """Flatten uint8 (p, h, w, 3) to float64 (p * h * w, 3) with mean 0."""
    flat = maps.reshape(-1, maps.shape[-1]).astype(np.float64)
    return flat - flat.mean(0)
