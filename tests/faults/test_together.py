"""Two commands with one output: the second waits or names the first; the lock of a dead process is free."""

import os
import re
import shutil
import signal
import socket
import time

from tests.faults import program
from tests.faults.program import EXTRACT, SET, SYNTHESIZE, TRAIN
from tests.faults.test_kills import begin, finished


def until(condition, command):
    """Wait until the condition holds, while the command runs."""
    while not condition():
        assert command.process.is_alive(), command.output
        time.sleep(0.005)


def stopped_while_holding(project, command, *arguments):
    """Start a command and stop it (SIGSTOP) after it has acquired a lock on something that takes time."""
    running = program.start(project, *command, *arguments)

    def locked():
        locks = (project / ".pipeline").rglob("locks/*")
        return any(file.read_text() for file in locks if "in-use" not in file.name and file.name != "plan")

    until(locked, running)
    os.kill(running.process.pid, signal.SIGSTOP)
    return running


def test_second_extraction_waits_for_the_first(made, project, trial):
    begin(project, "extract-features")
    with trial("two commands with one output") as tried:
        first = stopped_while_holding(project, EXTRACT)
        second = program.start(project, *EXTRACT, log=project.parent / "second.log")
        until(lambda: "Waiting for it" in second.output, second)
        named = rf"is being written by process {first.process.pid} on {socket.gethostname()} since 2\d\d\d-\d\d-\d\d "
        assert re.search(named, second.output), second.output
        os.kill(first.process.pid, signal.SIGCONT)
        assert first.end() == 0 and second.end() == 0, first.output + second.output
        tried.compare(finished(made.root, "extract-features"), finished(project, "extract-features"))


def test_lock_of_a_dead_process_is_free(made, project, trial):
    begin(project, "extract-features")
    with trial("lock of a dead process") as tried:
        first = stopped_while_holding(project, EXTRACT)
        first.process.kill()
        assert first.end() == -signal.SIGKILL
        assert [file for file in project.rglob("locks/*") if str(first.process.pid) in file.read_text()]
        output = program.succeed(project, *EXTRACT)
        assert "Waiting" not in output
        tried.compare(finished(made.root, "extract-features"), finished(project, "extract-features"))


def test_second_training_or_generation_is_refused(made, project, trial):
    for name, command in (("train-fl", TRAIN), ("synthesize", SYNTHESIZE)):
        with trial("two commands with one output") as tried:
            begin(project, name)
            first = stopped_while_holding(project, command)
            line = program.refuse(
                project, *command, says=[f"by process {first.process.pid} on", "since 2", "Wait until it has ended"],
                log=project.parent / "second.log",
            )  # fmt: skip
            assert name != "train-fl" or "feddifrc-iid/s0 is being written" in line
            os.kill(first.process.pid, signal.SIGCONT)
            assert first.end() == 0, first.output
            tried.compare(finished(made.root, name), finished(project, name))


def test_lock_file_with_invalid_content_is_replaced(made, project, trial):
    begin(project, "extract-features")
    with trial("lock of a dead process") as tried:
        staging = program.run(project, *EXTRACT, "--shard-range", "0:1")[1].splitlines()[-1]
        for file in program.Path(staging).glob("locks/*"):
            file.write_bytes(b"\xff\x00 not a holder")
        shutil.rmtree(project / SET, ignore_errors=True)
        program.succeed(project, *EXTRACT)
        tried.compare(finished(made.root, "extract-features"), finished(project, "extract-features"))
