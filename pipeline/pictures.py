"""A figure as SVG text without a date: the same figure gives the same bytes. matplotlib is loaded when one is drawn."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def svg(figure: "Figure", style: Any) -> str:
    """Draws a figure.

    Args:
        figure: matplotlib's.
        style: rcParams while it is drawn; `svg.hashsalt` among them, without which ids are random.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
