"""Threads sleep while they wait: the libraries that a command loads report it."""

import os
import re
import subprocess
import sys
import threading

import pytest

from pipeline import threads


def test_a_command_sets_the_policy_before_it_loads_openmp(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    (tmp_path / "params.yaml").write_text("{")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "report"],  # loads torch, then finds the mistake
        cwd=tmp_path,
        env=environment | {"OMP_DISPLAY_ENV": "TRUE"},
        capture_output=True,
        text=True,
    )
    assert re.findall(r"OMP_WAIT_POLICY\s*=\s*'(\w+)'", done.stderr) == ["PASSIVE"]


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_the_users_policy_takes_precedence(monkeypatch, before, after):
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # restored at the end
    del os.environ["OMP_WAIT_POLICY"]
    if before:
        os.environ["OMP_WAIT_POLICY"] = before
    threads.sleep_while_waiting()
    assert os.environ["OMP_WAIT_POLICY"] == after


def test_the_next_result_is_computed_while_one_is_used():
    second = threading.Event()

    def compute(item):
        if item == 1:
            second.set()
        return item * item

    results = threads.ahead(compute, iter(range(4)))
    assert next(results) == 0 and second.wait(10)  # nobody has asked for it yet
    assert list(results) == [1, 4, 9]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    assert list(threads.ahead(compute, [])) == []


def test_an_error_ahead_is_raised_in_its_turn_and_ends_the_thread():
    results = threads.ahead(lambda item: 1 // item, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    abandoned = threads.ahead(lambda item: item, range(9))
    assert next(abandoned) == 0
    abandoned.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
