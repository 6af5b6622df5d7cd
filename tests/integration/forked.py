"""`pipeline` for tests of DVC: commands forked from one process that has imported the libraries already.

A command of the installed program spends seconds on imports, and DVC starts dozens. `write_program` writes a `pipeline`
that hands its arguments, folder, environment and open files to the server and ends with the command's exit code.

    python -m tests.integration.forked ADDRESS        # the server; it ends when its standard input does
"""

import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path

from tests.faults import program

_PROGRAM = """#!{python} -IS
import json, os, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"!"], [0, 1, 2])
server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
server.shutdown(socket.SHUT_WR)
code = server.recv(1)
sys.exit(code[0] if code else "the command was killed")
"""


def write_program(folder: Path, address: Path) -> None:
    """Write the executable `pipeline` of a server."""
    file = folder / "pipeline"
    file.write_text(_PROGRAM.format(python=sys.executable, address=str(address)))
    file.chmod(0o755)


def _serve(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        for module in program.LIBRARIES:
            importlib.import_module(module)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a child: its connection tells its end
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    _run(connection)


def _run(connection: socket.socket) -> None:
    """Run the command that a client asks for, send its exit code and end this process."""
    from pipeline.cli.commands import main

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code = 1
    try:
        files = socket.recv_fds(connection, 1, 3)[1]
        arguments, folder, environment = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        main(arguments, prog_name="pipeline")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(bytes([code]))
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
