"""Figures as SVG or PNG in one style, readable on light and dark backgrounds, alone and within a page.

Text and axes take the reader's text colour on a transparent background: a file brings colours for light and dark mode,
and a page gives an inlined figure its own. Text stays searchable text and is never parsed as a formula. Without a date
and with seeded ids, the same figure gives the same bytes. matplotlib is imported when the first figure is drawn.
"""

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

P = ParamSpec("P")

INK = "#010203"  # placeholder for the reader's text colour while drawing; no palette has it

_STYLE: Any = {
    "svg.hashsalt": "feddifrc",
    "svg.fonttype": "none",
    "savefig.transparent": True,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{part}": INK for part in ("labelcolor", "edgecolor")},
}
_MOST_CELLS = 200  # of a heat map, along each side
_TAG = re.compile("<[^<>]*>")
_COLOURS = (
    "<style>:root { color: #1d2330; background: #fff } "
    "@media (prefers-color-scheme: dark) { :root { color: #e6e9ef; background: #14171d } }</style>"
)


def svg(draw: Callable[P, "Figure"]) -> Callable[P, str]:
    """Decorate a function that returns a matplotlib figure to return the text of an SVG file instead."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        buffer = io.StringIO()
        with _drawing(_STYLE):
            draw(*args, **kwargs).savefig(buffer, format="svg", metadata={"Date": None})
        text = re.sub("(<svg [^>]*>)", rf"\1{_COLOURS}", buffer.getvalue(), count=1)
        return _TAG.sub(lambda tag: tag[0].replace(INK, "currentColor"), text)

    return drawn


def png(draw: Callable[P, "Figure"]) -> Callable[P, bytes]:
    """Decorate a function that returns a matplotlib figure to return the bytes of a PNG file, on white, instead."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> bytes:
        buffer = io.BytesIO()
        with _drawing({}):
            draw(*args, **kwargs).savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()

    return drawn


@contextlib.contextmanager
def _drawing(style: Any) -> Iterator[None]:
    """Use matplotlib's defaults with `style`, not the user's matplotlibrc, and suppress its warnings."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # About missing glyphs, which the reader's fonts have, and about crowded axes.
        warnings.simplefilter("ignore", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield


def heat_map(axes: "Axes", values: np.ndarray, label: str) -> "AxesImage":
    """Draw a matrix in shades of blue from 0, with a colour bar that has this label.

    A large matrix is drawn in blocks of cells, each in the shade of their mean; the label then describes the blocks.
    """
    rows, columns = (-(-count // _MOST_CELLS) for count in values.shape)
    if (rows, columns) == (1, 1):
        image = axes.imshow(values, cmap="Blues", aspect="auto", vmin=0)
        axes.figure.colorbar(image, label=label)
        return image
    starts = [np.arange(0, count, step) for count, step in zip(values.shape, (rows, columns), strict=True)]
    sums = np.add.reduceat(np.add.reduceat(values, starts[0], 0), starts[1], 1)
    heights, widths = (np.diff(own, append=count) for own, count in zip(starts, values.shape, strict=True))
    extent = (-0.5, columns * len(widths) - 0.5, rows * len(heights) - 0.5, -0.5)
    # "none" stores one pixel for each cell, where others store those of the screen.
    style: Any = {"cmap": "Blues", "aspect": "auto", "vmin": 0, "interpolation": "none", "extent": extent}
    image = axes.imshow(sums / np.outer(heights, widths), **style)
    axes.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(values.shape[0] - 0.5, -0.5))
    axes.figure.colorbar(image, label=f"{label}, mean of blocks of {rows} x {columns}")
    return image


def inline(text: str, number: int) -> str:
    """Return a figure drawn by a function under `svg` as an element of a page, in the page's text colour.

    The number of the figure in the page is prefixed to its ids, so that no two figures share one.
    """
    element = text[text.index("<svg") :].replace(_COLOURS, "")
    return _TAG.sub(lambda tag: re.sub(r'( id="|href="#|url\(#)', rf"\1p{number}-", tag[0]), element)
