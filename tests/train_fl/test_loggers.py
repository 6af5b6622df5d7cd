"""Loggers get every round once, also in a resumed run, and their libraries are needed only if requested."""

import os
import pty
import re
import sys

import pytest

from pipeline.errors import PipelineError
from pipeline.manifests import run_name
from stages.train_fl import run
from tests.train_fl import tiny_project
from tests.train_fl.test_run import rows

BOTH = {"runtime__tensorboard": True, "runtime__dvclive": True}


def tensorboard_scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def check(project, path):
    expected = [(int(row["round"]), float(row["accuracy"])) for row in rows(path / "rounds.csv")]
    found = tensorboard_scalars(project.root / "tensorboard" / run_name(path), "accuracy")
    assert found == [(number, pytest.approx(accuracy)) for number, accuracy in expected]
    table = project.root / "dvclive" / run_name(path) / "plots" / "metrics" / "accuracy.tsv"
    lines = [line.split("\t") for line in table.read_text().splitlines()[1:]]
    assert [(int(step), float(value)) for step, value in lines] == expected
    assert len(expected) == 4


def test_every_round_is_logged(tmp_path):
    project = tiny_project.make(tmp_path, **BOTH)
    check(project, run(project, "fedavg", "iid", 0))
    assert not (tmp_path / "dvc.yaml").exists()


def test_a_resumed_run_leaves_one_curve(tmp_path, monkeypatch):
    project = tiny_project.make(tmp_path, **BOTH)
    from stages.train_fl import checkpoint

    save = checkpoint.Checkpoint.save

    def save_and_stop(self, progress, rows):
        save(self, progress, rows)
        if progress.number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(project, "fedavg", "iid", 0)
    monkeypatch.undo()
    check(project, run(project, "fedavg", "iid", 0))


def test_a_missing_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dvclive", None)
    with pytest.raises(PipelineError, match="dvclive is not installed, but runtime.dvclive is true"):
        run(tiny_project.make(tmp_path, runtime__dvclive=True), "fedavg", "iid", 0)


def test_a_terminal_gets_a_line_per_round(tmp_path, monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        run(tiny_project.make(tmp_path), "fedavg", "iid", 0)
    text = b""
    while True:
        try:
            text += os.read(ours, 65536)
        except OSError:
            break
    os.close(ours)
    assert "accuracy      loss  train loss   seconds" in text.decode()
    expected = rows(tmp_path / "results" / "fedavg-iid" / "s0" / "rounds.csv")
    lines = re.findall(r"^ +(\d+) +(\d+\.\d\d) % +\d", text.decode(), re.MULTILINE)
    assert lines == [(row["round"], f"{100 * float(row['accuracy']):.2f}") for row in expected]
