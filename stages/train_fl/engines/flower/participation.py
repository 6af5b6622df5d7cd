"""Who took part: participation.csv, a row a round and sampled client, and the same as a picture.

round, client, name, outcome ("trained", or why not), num_samples, train_seconds (on the node)
"""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import plotting
from pipeline.io import atomic
from stages.train_fl import records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
FILE = "participation.csv"


class Account:
    """The rows so far, kept in the run's folder after every round."""

    def __init__(self, path: Path, rounds_done: int) -> None:
        """In folder `path`; rows of an earlier start are kept for the rounds that it finished."""
        self._path = path
        self._earlier = [row for row in _read(path / FILE) if int(row["round"]) <= rounds_done]

    def write(self, rows: list[Row]) -> None:
        """The earlier rows and these, whole."""
        records.write_csv(self._path / FILE, self._earlier + rows)

    def summary(self) -> list[str]:
        """A line a client: how many of its rounds it took part in."""
        rows = _read(self._path / FILE)
        lines = []
        for client in sorted({int(row["client"]) for row in rows}):
            own = [row for row in rows if int(row["client"]) == client]
            missed = [f"round {row['round']}: {row['outcome']}" for row in own if row["outcome"] != "trained"]
            line = f"client {client} ({own[-1]['name']}): trained in {len(own) - len(missed)} of {len(own)} rounds"
            lines.append("; ".join([line, *missed]))
        return lines

    def draw(self) -> None:
        """participation.svg: a square a client and round; the same rows give the same bytes."""
        atomic.write_text(self._path / "participation.svg", _squares(_read(self._path / FILE)))


@plotting.svg
def _squares(rows: list[Row]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    clients = sorted({int(row["client"]) for row in rows})
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(clients)))
    axes = figure.add_subplot(xlabel="round")
    for trained, colour, label in ((True, "#2a7f62", "trained"), (False, "#c8553d", "asked, did not")):
        points = [row for row in rows if (row["outcome"] == "trained") == trained]
        x = [int(row["round"]) for row in points]
        y = [clients.index(int(row["client"])) for row in points]
        axes.scatter(x, y, marker="s", s=40, color=colour, label=label)
    names = {int(row["client"]): row["name"] for row in rows}
    axes.set_yticks(range(len(clients)), [names[client] for client in clients])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def _read(file: Path) -> list[Row]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))
    except FileNotFoundError:
        return []
