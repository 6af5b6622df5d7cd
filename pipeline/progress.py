"""Progress bars with time left, drawn on stderr when it is a terminal and silent when it is not."""

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")


def progress_bar(total: int, description: str, unit: str) -> "tqdm":
    """A bar to be moved by its `update(count)`; a context manager."""
    from tqdm import tqdm

    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}, {remaining} left, {rate_fmt}{postfix}]"
    silent = not sys.stderr.isatty()
    return tqdm(total=total, desc=description, unit=unit, disable=silent, bar_format=bar_format, dynamic_ncols=True)


def track(items: Iterable[T], description: str, total: int, unit: str = "step") -> Iterator[T]:
    """Yields `items` while showing how many are done, how fast, and the time left."""
    with progress_bar(total, description, unit) as bar:
        for item in items:
            yield item
            bar.update()
