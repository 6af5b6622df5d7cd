"""Programs that start in milliseconds: processes forked from one that has imported the libraries already.

An installed program spends seconds on imports; DVC and Flower start dozens. `write_programs` writes programs of the
same names that hand their arguments, folder, environment and open files to a server. The server runs the program's
entry point in a process of its own. The written program ends as that process does; if it is killed, so is the process.

    python -m tests.integration.forked ADDRESS        # the server; it ends when its standard input does

The server imports the libraries when the first program starts. One server serves all workers of a parallel run.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

ADDRESS = "FORKED_ADDRESS"
"""The environment variable that names the address of a server to the workers of a parallel run."""

STAGES = ("prepare_data", "prepare_backbone", "extract_features", "synthesize", "train_fl", "report")
LIBRARIES = [
    "pipeline.cli.commands",
    "sklearn.datasets",
    "sklearn.manifold",
    "matplotlib.figure",
    "matplotlib.style",
    "matplotlib.backends.backend_svg",
    "h5py",
    "stages.synthesize.generate",
    "stages.analyze_features.sweep.run",
    *(f"stages.{name}" for name in STAGES),
]
"""Modules that commands of `pipeline` import."""
_OF_OTHERS = [
    "dvc.cli.parser",
    "dvc.repo.reproduce",
    "dvc.repo.experiments.executor.local",
    "dvc.render",
    "flwr.cli.app",
    "flwr.superlink.cli",
    "flwr.supernode.cli",
]
_FORK = multiprocessing.get_context("fork")
_PROGRAM = """#!{python} -IS
import json, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"!"], [0, 1, 2])
server.sendall(json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode())
server.shutdown(socket.SHUT_WR)
code = int(server.recv(16) or 1)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def start() -> Callable[[], None]:
    """Start a server that ADDRESS names to this process and its children; return what ends it."""
    folder = tempfile.TemporaryDirectory(prefix="forked-")  # the address of a socket must be short
    address = Path(folder.name) / "address"
    quiet = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}  # read while importing; only one thread may fork
    server = subprocess.Popen(
        [sys.executable, "-m", __name__, address], cwd=Path(__file__).parents[2], env=os.environ | quiet,
        stdin=subprocess.PIPE,
    )  # fmt: skip
    while not address.exists():
        assert server.poll() is None
        time.sleep(0.005)
    os.environ[ADDRESS] = str(address)

    def end() -> None:
        del os.environ[ADDRESS]
        server.communicate()
        folder.cleanup()

    return end


def write_programs(folder: Path, *names: str) -> None:
    """Write executables of these names, which must be console scripts of installed packages."""
    for name in names:
        file = folder / name
        file.write_text(_PROGRAM.format(python=sys.executable, address=os.environ[ADDRESS]))
        file.chmod(0o755)


def _serve(address: str) -> None:
    running: dict[socket.socket, BaseProcess] = {}
    events, (ended, end) = select.poll(), os.pipe()
    os.set_blocking(end, False)
    signal.set_wakeup_fd(end)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then close the input
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(100)
        for file in (sys.stdin.fileno(), listener.fileno(), ended):
            events.register(file, select.POLLIN)
        while sys.stdin.fileno() not in (ready := dict(events.poll())):
            if ended in ready:
                os.read(ended, 4096)
            for connection, process in list(running.items()):
                if process.exitcode is not None:
                    events.unregister(connection)
                    del running[connection]
                    with connection, contextlib.suppress(BrokenPipeError):
                        connection.send(str(process.exitcode).encode())
                elif connection.fileno() in ready:  # the program was killed
                    process.kill()
            if listener.fileno() in ready:
                connection, _ = listener.accept()
                _import()
                running[connection] = _FORK.Process(target=_run, args=(connection,))
                running[connection].start()
                events.register(connection, 0)  # of which only the hang-up is reported
    for process in running.values():
        process.kill()


def _import() -> None:
    if LIBRARIES[0] not in sys.modules:
        for module in (*LIBRARIES, *_OF_OTHERS):
            importlib.import_module(module)
        assert threading.active_count() == 1
        gc.freeze()  # so that the children's garbage collections are short


def _run(connection: socket.socket) -> None:
    """Run the program that a client asks for, in this process."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with connection:
        files = socket.recv_fds(connection, 1, 3)[1]
        sys.argv, folder, environment = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    name = Path(sys.argv[0]).name
    sys.path[0] = str(Path(sys.executable).parent)  # as for an installed program
    sys.modules["__main__"].__package__ = None  # or click calls the program `python -m`
    if name.startswith("flwr"):  # which imports the project from the app that Flower sends
        for module in [module for module in sys.modules if module.split(".")[0] in ("pipeline", "stages", "tests")]:
            del sys.modules[module]
    (program,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    sys.exit(program.load()())


if __name__ == "__main__":
    _serve(sys.argv[1])
