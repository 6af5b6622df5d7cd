"""A table of DVC's experiments (`dvc exp run`): the settings that each changed, and its accuracies."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import accuracy
from pipeline.errors import PipelineError
from pipeline.settings.config import dotted
from stages.report.formats import Cell, Table

_MEANS = re.compile(r"results/([^/]+)\.json")


def table(root: Path) -> Table | None:
    """List every finished experiment of the project below the current state; None if there is none."""
    shown = _show(root)
    current = _data(shown[0])
    rows = []
    for commit in shown:
        for experiment in commit.get("experiments") or []:
            last = experiment["revs"][0]
            if not last.get("error") and _means(_data(last)):
                rows.append((experiment["name"] or last["rev"][:8], _data(last)))
    if not rows:
        return None
    columns = list(dict.fromkeys(run for data in [current, *(data for _, data in rows)] for run in _means(data)))
    cells = [[Cell("current"), Cell(""), *_accuracies(current, columns)]]
    cells += [[Cell(name), Cell(_changes(current, found)), *_accuracies(found, columns)] for name, found in rows]
    note = "Settings that differ from params.yaml, and accuracy, %; over several seeds, mean ± standard deviation."
    header = ["experiment", "changes", *columns]
    return Table("experiments", "Experiments", note, header, cells)


def _show(root: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise PipelineError(f"`dvc exp show` failed in {root} ({reason}). Run it there to see more.") from None


def _data(revision: dict[str, Any]) -> dict[str, Any]:
    return revision.get("data") or {}


def _means(data: dict[str, Any]) -> dict[str, Cell]:
    """Return "method-partition" -> the accuracy over seeds, of an experiment's runs."""
    found = {}
    for file, content in (data.get("metrics") or {}).items():
        of, values = _MEANS.fullmatch(file), content.get("data") or {}
        if of and (mean := values.get("mean_last5_accuracy")) is not None:
            found[of[1]] = Cell(accuracy.as_percent(mean, values.get("std")), mean)
    return found


def _accuracies(data: dict[str, Any], columns: list[str]) -> list[Cell]:
    means = _means(data)
    return [means.get(column, Cell("–")) for column in columns]


def _changes(current: dict[str, Any], experiment: dict[str, Any]) -> str:
    """List the keys of params.yaml that differ, with the experiment's values."""
    ours, theirs = (
        dotted(((data.get("params") or {}).get("params.yaml") or {}).get("data")) for data in (current, experiment)
    )
    return ", ".join(f"{key} = {value}" for key, value in theirs.items() if ours.get(key, ...) != value) or "nothing"
