"""The table of who took part: appended to, and continued after a kill."""

import os
import resource

import pytest

from pipeline.errors import PipelineError
from pipeline.federation.members import Member
from pipeline.io import atomic
from stages.train_fl.engines.flower.messages import TrainReply
from stages.train_fl.engines.flower.participation import Participation
from stages.train_fl.methods.state import ClientUpdate

A, B = Member(11, 0, "a", 5, {}), Member(22, 1, "b", 7, {})
HEADER = "round,client,name,outcome,num_samples,train_seconds\n"


def reply(samples):
    return TrainReply(ClientUpdate({}, samples, 1), {}, False, 0.0, 1.5)


def three_rounds(folder):
    table = Participation(folder, 0)
    table.add(1, {A: reply(5), B: reply(7)}, {})
    table.add(2, {A: reply(5)}, {B: "no answer"})
    table.add(3, {B: reply(7)}, {})
    return table


def test_rounds_are_appended(tmp_path):
    table = three_rounds(tmp_path)
    text = HEADER + "1,0,a,trained,5,1.5\n1,1,b,trained,7,1.5\n2,0,a,trained,5,1.5\n2,1,b,no answer,0,\n"
    text += "3,1,b,trained,7,1.5\n"
    file = tmp_path / "participation.csv"
    assert file.read_text() == text
    summary = "client 0 (a): trained in 2 of 2 rounds\nclient 1 (b): trained in 2 of 3 rounds; round 2: no answer"
    assert table.summary() == summary and table.outcomes() == "client 1: trained"
    number = file.stat().st_ino
    table.add(4, {}, {A: "gone", B: "gone"})
    assert file.stat().st_ino == number and file.read_text().startswith(text)


@pytest.mark.parametrize("torn", ["", "3,1,b,trai", "2,1,b"])
def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path, torn):
    table = three_rounds(tmp_path)
    file = tmp_path / "participation.csv"
    cached = tmp_path / "cached"
    with file.open("a") as stream:
        stream.write(torn)  # of a process that was killed
    os.link(file, cached)  # as DVC does
    before = cached.read_text()
    table = Participation(tmp_path, 2)
    assert file.read_text() == before.partition("3,1,b")[0]
    assert table.summary().endswith("client 1 (b): trained in 1 of 2 rounds; round 2: no answer")
    table.add(3, {B: reply(7)}, {})
    assert file.read_text() == before.removesuffix(torn) and cached.read_text() == before
    Participation(tmp_path, 0).add(1, {A: reply(5)}, {})
    assert file.read_text() == HEADER + "1,0,a,trained,5,1.5\n"


def test_rows_that_do_not_fit_leave_the_file_as_it_was(tmp_path):
    file = tmp_path / "rows.csv"
    atomic.append_csv(file, [{"a": 1}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(PipelineError, match=r"rows.csv cannot be written \(File too large\)"):
            atomic.append_csv(file, [{"a": 10**9}] * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_text() == "a\n1\n"
