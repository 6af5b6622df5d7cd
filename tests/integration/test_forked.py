"""Forked programs behave as installed ones: output, exit codes and signals, and none outlives who started it."""

import os
import select
import signal
import socket
import subprocess

import pytest

from tests.integration.forked import ADDRESS, Process, write_programs


def test_output_and_exit_code_are_those_of_the_program(quick_bin, tmp_path):
    done = subprocess.run([quick_bin / "pipeline", "report"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and "params.yaml" in done.stderr
    done = subprocess.run([quick_bin / "pipeline", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Usage: pipeline [OPTIONS]") and done.stderr == ""


def test_code_runs_as_in_an_interpreter_and_reads_its_input(tmp_path):
    write_programs(tmp_path, "python")
    code = "import sys; print(__name__, 'torch' in sys.modules, input(), sys.argv); sys.exit(3)"
    words = [tmp_path / "python", "-u", "-c", code, "-m"]
    done = subprocess.run(words, input="x\n", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "__main__ True x ['-c', '-m']\n", "")


def test_file_runs_as_in_an_interpreter(tmp_path):
    write_programs(tmp_path, "python")
    (tmp_path / "beside.py").write_text("value = 5")
    (tmp_path / "file.py").write_text("import sys, beside; print(__name__, beside.value, input(), sys.argv[1:])")
    words = [tmp_path / "python", "file.py", "-c"]
    done = subprocess.run(words, input="x\n", capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "__main__ 5 x ['-c']\n", "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_exit_code_tells_the_signal(tmp_path, number):
    process = Process("signal:pause", [], tmp_path, os.environ, tmp_path / "log")
    assert process.is_alive()
    os.kill(process.pid, number)
    assert process.end(60) == -number and not process.is_alive()


def test_function_runs_in_its_folder_and_environment_with_its_log(tmp_path):
    process = Process("os:system", ["pwd; echo $A"], tmp_path, {"A": "b"}, tmp_path / "log")
    assert process.end(60) == 0
    assert (tmp_path / "log").read_text().split() == [str(tmp_path), "b"]


def test_process_ends_if_its_program_is_killed(quick_bin, tmp_path):
    os.mkfifo(tmp_path / "params.yaml")  # which it reads until the end
    reading, writing = os.pipe()
    program = subprocess.Popen([quick_bin / "pipeline", "report"], cwd=tmp_path, stdout=writing, stderr=writing)
    os.close(writing)
    with open(tmp_path / "params.yaml", "wb"):  # after the process has opened it
        program.kill()
        assert program.wait() == -signal.SIGKILL
        assert select.select([reading], [], [], 60)[0] and os.read(reading, 1) == b""  # nobody has the other end
    os.close(reading)


def test_program_killed_at_its_start_leaves_the_server_working(tmp_path):
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as program:
            program.connect(os.environ[ADDRESS])
    process = Process("os:system", ["true"], tmp_path, os.environ, tmp_path / "log")
    assert process.end(60) == 0
