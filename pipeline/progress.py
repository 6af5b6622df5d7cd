"""Progress with speed and time left: a bar on stderr if it is a terminal, else a log line every minute."""

import functools
import io
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

log = logging.getLogger(__name__)

_SECONDS_PER_LINE = 60


def progress_bar(total: int, description: str, unit: str) -> "tqdm":
    """Return a progress bar, a context manager that is advanced by `update(count)`.

    The unit "B" means bytes, shown as kB, MB or GB.
    """
    from tqdm import tqdm

    scaled, on_terminal = unit == "B", sys.stderr.isatty()
    bar = "{desc}: {percentage:3.0f}%" + ("|{bar}| " if on_terminal else ", ")
    done = "{n_fmt}B/{total_fmt}B" if scaled else "{n:.0f}/{total}"
    bar_format = bar + done + " [{elapsed}, {remaining} left, {rate_fmt}{postfix}]"
    options = {"total": total, "desc": description, "unit": unit, "unit_scale": scaled, "bar_format": bar_format}
    if on_terminal:
        return tqdm(**options, dynamic_ncols=True)

    # Without maxinterval, tqdm's thread draws after ten seconds without a step.
    pace = {"mininterval": _SECONDS_PER_LINE, "maxinterval": _SECONDS_PER_LINE}
    return _lines()(**options, **pace, file=io.StringIO(), leave=False)


@functools.cache
def _lines() -> "type[tqdm]":
    """Return the class of bars that log lines: one class, because tqdm keeps a thread for each class for ever."""
    from tqdm import tqdm

    class Lines(tqdm):
        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            if msg is None and 0 < self.n < self.total:  # the message that clears a line at the end is ""
                log.info("%s", self)
            return True

    return Lines


def track(items: Iterable[T], description: str, total: int, unit: str = "step") -> Iterator[T]:
    """Yield `items` while showing the number done, the speed and the time left."""
    with progress_bar(total, description, unit) as bar:
        for item in items:
            yield item
            bar.update()
