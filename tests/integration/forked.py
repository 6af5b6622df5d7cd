"""Programs that start in milliseconds: processes forked from one that has imported the libraries already.

An installed program spends seconds on imports; DVC and Flower start dozens. `write_programs` writes programs of the
same names that hand their arguments, folder, environment and open files to a server. The server runs the program's
entry point in a process of its own. The written program ends as that process does; if it is killed, so is the process.

    python -m tests.integration.forked ADDRESS        # the server; it ends when its standard input does

The server imports the libraries when the first program starts. One server serves all workers of a parallel run.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

ADDRESS = "FORKED_ADDRESS"
"""The environment variable that names the address of a server to the workers of a parallel run."""

_STAGES = ("prepare_data", "prepare_backbone", "extract_features", "synthesize", "train_fl", "report")
_LIBRARIES = [
    "pipeline.cli.commands",
    "sklearn.datasets",
    "sklearn.manifold",
    "matplotlib.figure",
    "matplotlib.style",
    "matplotlib.backends.backend_svg",
    "h5py",
    "stages.synthesize.generate",
    "stages.analyze_features.sweep.run",
    *(f"stages.{name}" for name in _STAGES),
    "tests.faults.program",
    "accelerate.commands.accelerate_cli",
    "torch.distributed.run",
    "dvc.cli.parser",
    "dvc.cachemgr",
    "dvc.repo.open_repo",
    "dvc.repo.trie",
    "dvc.utils.strictyaml",
    "dvc_data.hashfile.status",
    "dvc_data.index.checkout",
    "dvc_data.index.collect",
    "dvc_data.index.fetch",
    "dulwich.ignore",
    "platformdirs.unix",
    "dvc.repo.reproduce",
    "dvc.repo.experiments.executor.local",
    "dvc.render",
    "dvc.data_cloud",
    "dvc.repo.artifacts",
    "dvc.repo.datasets",
    "dvc.repo.graph",
    "dvc.repo.index",
    "dvc.repo.stage",
    "dvc.repo.plots",
    "networkx",
    "s3fs",
    "httpcore",
    "flwr.cli.app",
    "flwr.superlink.cli",
    "flwr.supernode.cli",
    "flwr.supernode.main",
    "flwr.superlink.main",
    "flwr.supercore.cli",
    "flwr.supercore.superexec.run_superexec",
    "hypothesis",
    "ruamel.yaml",
    "diffusers.guiders",
    "diffusers.schedulers.scheduling_deis_multistep",
    "PIL.JpegImagePlugin",
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.PpmImagePlugin",
    "moto.server",
]
"""Modules that the programs import."""
_FORK = multiprocessing.get_context("fork")
_PROGRAM = """#!{python} -IS
import json, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"!"], [0, 1, 2])
server.sendall(json.dumps([None, [sys.argv, {site!r}], os.getcwd(), dict(os.environ)]).encode())
server.shutdown(socket.SHUT_WR)
server.recv(4)
code = int(server.recv(16))
if code < 0:
    if -code != signal.SIGKILL:
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


def write_programs(folder: Path, *names: str, site: Path | None = None) -> None:
    """Write executables of these names.

    Args:
        folder: Where to write them.
        names: Console scripts of installed packages, or `python`, which runs a file, a module (`-m`) or code (`-c`).
        site: Folder of another installation of the project, which they run instead of this repository.
    """
    for name in names:
        file = folder / name
        text = _PROGRAM.format(python=sys.executable, address=os.environ[ADDRESS], site=site and str(site))
        file.unlink(missing_ok=True)  # it may be a link
        file.write_text(text)
        file.chmod(0o755)


class Process:
    """A function called in a process of the server."""

    def __init__(
        self, function: str, arguments: Sequence[Any], folder: Path, environment: Mapping[str, str], log: Path
    ):
        """Start it.

        Args:
            function: `module:name`.
            arguments: Its arguments, of JSON's types.
            folder: Where the process runs.
            environment: All environment variables.
            log: The file for its standard output and error.
        """
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(os.environ[ADDRESS])
        with open(os.devnull) as nothing, log.open("wb") as output:
            socket.send_fds(self._server, [b"!"], [nothing.fileno(), output.fileno(), output.fileno()])
        self._server.sendall(json.dumps([function, arguments, str(folder), dict(environment)]).encode())
        self._server.shutdown(socket.SHUT_WR)
        self.pid = int.from_bytes(self._server.recv(4), "big")
        self._code: int | None = None

    def end(self, seconds: float) -> int | None:
        """Wait for its end; return the exit code, minus the number of a signal, or None if it still runs."""
        if self._code is None and select.select([self._server], [], [], seconds)[0]:
            with self._server:
                self._code = int(self._server.recv(16))
        return self._code

    def is_alive(self) -> bool:
        return self.end(0) is None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(self.pid, signal.SIGKILL)


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
                with contextlib.suppress(BrokenPipeError):  # the program was killed already, as poll will report
                    connection.send(running[connection].pid.to_bytes(4, "big"))
                events.register(connection, 0)  # of which only the hang-up is reported
    for process in running.values():
        process.kill()


def _import() -> None:
    if _LIBRARIES[0] not in sys.modules:
        gc.disable()  # there is no garbage yet
        for module in _LIBRARIES:
            importlib.import_module(module)
        assert threading.active_count() == 1
        gc.freeze()  # so that the children's garbage collections are short
        gc.enable()
        _use_huge_pages()


def _use_huge_pages() -> None:
    """Move this process's memory to huge pages, where Linux can: fork copies the table of pages, 55 ms without them."""
    size, collapse = 2 << 20, 25  # MADV_COLLAPSE, of Linux 6.1; others refuse it, and nothing changes
    try:
        advise = ctypes.CDLL(None).madvise
        regions = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    except (AttributeError, OSError):
        return
    for place, access, _, _, inode, *_ in regions:
        first, end = (int(address, 16) for address in place.split("-"))
        first, end = -(-first // size) * size, end // size * size
        if inode == "0" and access.startswith("rw") and first < end:
            advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), collapse)


def _run(connection: socket.socket) -> None:
    """Run the function or program that a client asks for, in this process."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with connection:
        files = socket.recv_fds(connection, 1, 3)[1]
        wanted = b"".join(iter(lambda: connection.recv(65536), b""))
    if not wanted:  # the program was killed before it could say
        return
    function, arguments, folder, environment = json.loads(wanted)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # which torch read when the server imported it
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if function:
        pkgutil.resolve_name(function)(*arguments)
    else:
        _run_program(*arguments)


def _run_program(arguments: list[str], site: str | None) -> NoReturn:
    sys.argv, name = arguments, Path(arguments[0]).name
    if name == "python" and Path(arguments[1]).is_file():
        sys.argv, sys.path[0] = arguments[1:], str(Path(arguments[1]).resolve().parent)
        sys.stdin = open(0, closefd=False)  # which multiprocessing has replaced
        runpy.run_path(arguments[1], run_name="__main__")
        sys.exit()
    if name == "python":
        first = next(place for place, word in enumerate(arguments) if word in ("-c", "-m"))
        sys.argv = arguments[first + 1 :]
        if arguments[first] == "-c":
            code, sys.argv[0] = sys.argv[0], "-c"
            sys.modules["__main__"] = types.ModuleType("__main__")
            sys.stdin = open(0, closefd=False)  # which multiprocessing has replaced
            exec(code, sys.modules["__main__"].__dict__)
            sys.exit()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        sys.exit()
    sys.path[0] = site or str(Path(sys.executable).parent)  # as for an installed program
    sys.modules["__main__"].__package__ = None  # or click calls the program `python -m`
    if site or name.startswith("flwr"):  # Flower's programs import the project from the app that it sends
        for module in [module for module in sys.modules if module.split(".")[0] in ("pipeline", "stages", "tests")]:
            del sys.modules[module]
    (program,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    sys.exit(program.load()())


if __name__ == "__main__":
    _serve(sys.argv[1])
