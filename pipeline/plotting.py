"""Pictures as SVG text, all in one style: they read on white and in the dark, alone and within a page.

Text and axes are drawn in the reader's own colour, on nothing: a file brings colours of ink and paper for light and for
dark, a page gives an inlined picture its own. Text is text, searchable, and never read as formulas. No date and seeded
ids: the same figure gives the same bytes. matplotlib is loaded when the first picture is drawn.
"""

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")

INK = "#010203"
"""Stands for the reader's text colour while a figure is drawn; a colour that no palette has."""

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
_COLOURS = (
    "<style>:root { color: #1d2330; background: #fff } "
    "@media (prefers-color-scheme: dark) { :root { color: #e6e9ef; background: #14171d } }</style>"
)


def svg(draw: Callable[P, "Figure"]) -> Callable[P, str]:
    """Makes a function that draws a figure, from matplotlib's Figure() on, return it as the text of an SVG file."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        buffer = io.StringIO()
        with _drawing(_STYLE):
            draw(*args, **kwargs).savefig(buffer, format="svg", metadata={"Date": None})
        text = re.sub("(<svg [^>]*>)", rf"\1{_COLOURS}", buffer.getvalue(), count=1)
        return _TAG.sub(lambda tag: tag[0].replace(INK, "currentColor"), text)

    return drawn


def png(draw: Callable[P, "Figure"]) -> Callable[P, bytes]:
    """Makes a function that draws a figure return it as a PNG file, on white."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> bytes:
        buffer = io.BytesIO()
        with _drawing({}):
            draw(*args, **kwargs).savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()

    return drawn


@contextlib.contextmanager
def _drawing(style: Any) -> Iterator[None]:
    """Matplotlib's defaults with `style` over them, whatever the user's matplotlibrc says, and none of its warnings."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of glyphs, which the reader's fonts have, and of crowded axes
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield


def inline(text: str, number: int) -> str:
    """A picture as an element of a page, in the page's text colour.

    Args:
        text: what `svg` gave.
        number: of the picture in the page; its ids begin with it, so that no two pictures' ids collide.
    """
    element = text[text.index("<svg") :].replace(_COLOURS, "")
    return _TAG.sub(lambda tag: re.sub(r'( id="|href="#|url\(#)', rf"\1p{number}-", tag[0]), element)
