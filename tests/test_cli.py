"""How commands end when they are interrupted or their output is closed, and shell completion."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from pipeline.cli.commands import main
from tests.conftest import REPOSITORY, invoke, write_params

TRAIN = ("train-fl", "--method", "fedavg", "--partition", "iid", "--seed", "0")


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize(("number", "what", "code"), [(2, "Interrupted", 130), (15, "Stopped by SIGTERM", 143)])
@pytest.mark.parametrize(
    ("command", "then"),
    [
        (TRAIN, "completed work is kept; run the command again to resume."),
        (("features", "list"), "run the command again to start over."),
        (("prepare-data",), "run the command again to start over."),  # its end says whether it keeps anything
        (("analyze-features",), "run the command again to start over."),
    ],
)
def test_interrupted_command_says_whether_it_resumes(tmp_path, command, then, number, what, code):
    os.mkfifo(tmp_path / "params.yaml")
    ended = threading.Event()

    def stop():
        with open(tmp_path / "params.yaml", "w"):  # once the command reads it, and waits for more
            os.kill(os.getpid(), number)
            ended.wait(5)

    stopping = threading.Thread(target=stop)
    stopping.start()
    result = invoke(tmp_path, *command)
    ended.set()
    stopping.join()
    assert (result.exit_code, result.output.strip()) == (code, f"{what}: {then}")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_closed_output_is_not_an_error(tmp_path, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    write_params(tmp_path, {})
    with contextlib.suppress(BrokenPipeError), open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit):
            main(["--params", str(tmp_path / "params.yaml"), "features", "list"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_offers_commands(shell):
    program = "from pipeline.cli import main; main(prog_name='pipeline')"

    def answer(**variables):
        done = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | variables, cwd=REPOSITORY, capture_output=True, text=True
        )
        return done.stdout

    if shell != "bash":  # click asks bash for its version, which a machine may lack
        assert "_PIPELINE_COMPLETE" in answer(_PIPELINE_COMPLETE=f"{shell}_source")
    words = {"COMP_WORDS": "pipeline train", "COMP_CWORD": "1" if shell != "fish" else "train"}
    assert "train-fl" in answer(_PIPELINE_COMPLETE=f"{shell}_complete", **words)


def test_ctrl_c_during_the_imports_leaves_no_traceback():
    code = (
        "import os, runpy, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(name, path, target=None):\n"
        "        if name == 'pipeline.cli.commands':\n            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting)\n"
        "runpy.run_module('pipeline', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
