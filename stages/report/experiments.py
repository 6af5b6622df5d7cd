"""DVC's experiments (`dvc exp run`) as one more table of the report: what each changed, and what came of it."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import accuracy
from pipeline.errors import PipelineError
from pipeline.settings.config import dotted
from stages.report.tables import Cell, Table

_RUN = re.compile(r"results/(.+)-s\d+/metrics\.json")


def table(root: Path) -> Table | None:
    """Every experiment of the project at `root` that has run, under the present state; None if there is none.

    Raises:
        PipelineError: the folder is no DVC project in git.
    """
    shown = _show(root)
    present = _data(shown[0])
    rows = []
    for commit in shown:
        for experiment in commit.get("experiments") or []:
            last = experiment["revs"][0]
            if not last.get("error") and _runs(_data(last)):
                rows.append((experiment["name"] or last["rev"][:8], _data(last)))
    if not rows:
        return None
    columns = list(dict.fromkeys(run for data in [present, *(data for _, data in rows)] for run in _runs(data)))
    cells = [[Cell("here"), Cell(""), *_accuracies(present, columns)]]
    cells += [[Cell(name), Cell(_changes(present, found)), *_accuracies(found, columns)] for name, found in rows]
    note = "What each changed against params.yaml, and its accuracy, %; mean ± standard deviation where it has seeds."
    header = ["experiment", "changed", *columns]
    return Table("experiments", "Experiments", note, header, cells)


def _show(root: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise PipelineError(f"{root}: `dvc exp show` failed ({reason})") from None


def _data(revision: dict[str, Any]) -> dict[str, Any]:
    return revision.get("data") or {}


def _runs(data: dict[str, Any]) -> dict[str, list[float]]:
    """Accuracies over seeds by "method-partition", of the runs that an experiment holds."""
    found: dict[str, list[float]] = {}
    for file, content in (data.get("metrics") or {}).items():
        run = _RUN.fullmatch(file)
        if run and "mean_last5_accuracy" in (content.get("data") or {}):
            found.setdefault(run[1], []).append(content["data"]["mean_last5_accuracy"])
    return found


def _accuracies(data: dict[str, Any], columns: list[str]) -> list[Cell]:
    runs = _runs(data)
    return [
        Cell(accuracy.in_percent(runs[column]), statistics.fmean(runs[column])) if column in runs else Cell("–")
        for column in columns
    ]


def _changes(present: dict[str, Any], other: dict[str, Any]) -> str:
    """The keys of params.yaml that differ, with the experiment's values."""
    mine, theirs = (
        dotted(((data.get("params") or {}).get("params.yaml") or {}).get("data")) for data in (present, other)
    )
    return ", ".join(f"{key} = {value}" for key, value in theirs.items() if mine.get(key, ...) != value) or "nothing"
