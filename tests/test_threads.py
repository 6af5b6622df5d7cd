"""Threads sleep while they wait: the libraries that a command loads report it."""

import os
import re
import subprocess
import sys

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
