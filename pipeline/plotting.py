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
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")

INK = "#010203"
"""Placeholder for the reader's text colour while drawing; no palette has this colour."""

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
_TAG = re.compile("<[^<>]*>")
_LONGEST_CLASS_NAME = 14  # characters
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


def inline(text: str, number: int) -> str:
    """Return a figure as an element of a page, in the page's text colour.

    Args:
        text: Result of a function decorated by `svg`.
        number: Number of the figure in the page, prefixed to its ids so that no two figures share one.
    """
    element = text[text.index("<svg") :].replace(_COLOURS, "")
    return _TAG.sub(lambda tag: re.sub(r'( id="|href="#|url\(#)', rf"\1p{number}-", tag[0]), element)


def shorten(text: str, most: int) -> str:
    """Cut a label to at most this many characters, the last of which is then an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


@svg
def clients_by_class(counts: np.ndarray, class_names: Sequence[str], title: str, most: int) -> "Figure":
    """Draw the samples per client and class as dots.

    Args:
        counts: int64 (num_clients, num_classes).
        class_names: One per class.
        title: Title of the figure.
        most: Number of samples of a dot that fills its cell; give several figures the same to compare them.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, min(9.0, 1.1 + 0.24 * len(counts))))
    axes = figure.add_subplot()
    axes.grid()
    clients, classes = np.nonzero(counts)
    axes.scatter(classes, clients, s=170 * counts[clients, classes] / most, color="#0072B2", lw=0)
    shown = list(range(0, counts.shape[1], max(1, counts.shape[1] // 20)))
    axes.set(title=title, xlabel="class", ylabel="client", xticks=shown)
    short = [shorten(name, _LONGEST_CLASS_NAME) for name in class_names]
    is_unique = len(set(short)) == len(short)
    names = [short[k] if is_unique else str(k) for k in shown]
    axes.set_xticklabels(names, rotation=60 if len("".join(names)) > 30 else 0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    return figure
