"""How commands end that are stopped, or whose output nobody reads any more."""

import contextlib
import os
import signal
import sys
import threading

import pytest

from pipeline.cli.commands import main
from tests.conftest import invoke, write_params

TRAIN = ("train-fl", "--method", "fedavg", "--partition", "iid", "--seed", "0")


@pytest.mark.parametrize(("number", "said", "code"), [(2, "Interrupted", 130), (15, "Stopped by SIGTERM", 143)])
@pytest.mark.parametrize(
    ("command", "then"),
    [
        (TRAIN, "what was finished is kept, and the same command continues from there."),
        (("features", "list"), "run the same command again; it starts from the beginning."),
        (("prepare-data",), "run the same command again; it starts from the beginning."),
    ],
)
def test_a_stopped_command_says_whether_it_goes_on(tmp_path, command, then, number, said, code):
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
    assert (result.exit_code, result.output.strip()) == (code, f"{said}: {then}")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_output_that_nobody_reads_any_more_is_no_error(tmp_path, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    write_params(tmp_path, {})
    with contextlib.suppress(BrokenPipeError), open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit):
            main(["--params", str(tmp_path / "params.yaml"), "features", "list"])
    assert capsys.readouterr().err == ""
