"""DVC's experiments (`dvc exp run`) as one more table of the report: what each changed, and what came of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from stages.report.tables import Cell, Table

_SUMMARY = "report/summary.json"


def table(root: Path) -> Table | None:
    """Every experiment of the project at `root` that has run, under the present state; None if there is none.

    Raises:
        PipelineError: the folder is no DVC project in git.
    """
    shown = _show(root)
    present = _data(shown[0])
    rows, columns = [], _columns(present)
    for commit in shown:
        for experiment in commit.get("experiments") or []:
            last = experiment["revs"][0]
            if not last.get("error") and _columns(found := _data(last)):
                columns |= _columns(found)
                rows.append((experiment["name"] or last["rev"][:8], found))
    if not rows:
        return None
    cells = [[Cell("here"), Cell(""), *_accuracies(present, columns)]]
    cells += [[Cell(name), Cell(_changes(present, found)), *_accuracies(found, columns)] for name, found in rows]
    note = "Experiments of this project, and what each changed against params.yaml; mean accuracy over seeds, %."
    header = ["experiment", "changed", *(", ".join(column) for column in columns)]
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


def _summary(data: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    return ((data.get("metrics") or {}).get(_SUMMARY) or {}).get("data") or {}


def _columns(data: dict[str, Any]) -> dict[tuple[str, str], None]:
    """(method, partition), in order."""
    summary = _summary(data)
    return {(method, partition): None for partition, methods in summary.items() for method in methods}


def _accuracies(data: dict[str, Any], columns: dict[tuple[str, str], None]) -> list[Cell]:
    cells = []
    for method, partition in columns:
        found = _summary(data).get(partition, {}).get(method)
        cells.append(Cell(f"{100 * found['mean_accuracy']:.2f}", found["mean_accuracy"]) if found else Cell("–"))
    return cells


def _changes(present: dict[str, Any], other: dict[str, Any]) -> str:
    """The keys of params.yaml that differ, with the experiment's values."""
    mine, theirs = (
        _flat(((data.get("params") or {}).get("params.yaml") or {}).get("data")) for data in (present, other)
    )
    return ", ".join(f"{key} = {value}" for key, value in theirs.items() if mine.get(key, ...) != value) or "nothing"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    parts = [_flat(inner, f"{prefix}.{key}" if prefix else key) for key, inner in value.items()]
    return {key: inner for part in parts for key, inner in part.items()}
