"""A federation on this machine: one SuperLink and any number of SuperNodes, real processes on loopback ports.

For the demo, the tests and the benchmark. All files are in one folder: Flower's own under flwr/, the output of every
process under logs/. All processes are terminated at the end.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.errors import PipelineError

_CONNECTION = "loopback"
_POLL_SECONDS = 0.3


class Loopback:
    """A SuperLink that runs during a `with` block, and the SuperNodes started in it."""

    def __init__(
        self,
        folder: Path,
        app: Path,
        certificates: Path | None = None,
        authenticate: bool = False,
        simulated_nodes: int = 0,
        programs: Path | None = None,
    ) -> None:
        """Configure the federation; `with` starts it.

        Args:
            folder: For everything that the processes write.
            app: The clone of the project, which Flower bundles and sends to the nodes.
            certificates: Folder of ca.crt, server.pem and server.key for TLS; None: no TLS.
            authenticate: Accept only nodes whose public key is registered.
            simulated_nodes: Number of nodes that Ray simulates instead of SuperNodes (needs flwr[simulation]).
            programs: Folder of programs of Flower to prefer to the installed ones.
        """
        self.folder, self._app, self._certificates, self._authenticate = folder, app, certificates, authenticate
        self._simulated_nodes = simulated_nodes
        self._path = [str(path) for path in (programs, Path(sys.executable).parent) if path]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._port = free_port()

    def __enter__(self) -> Self:
        """Start the SuperLink and wait until it answers."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.start_superlink()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Terminate all processes."""
        for name in list(self._processes):
            self.stop(name)

    def start_superlink(self) -> None:
        """Start the SuperLink; after a `stop`, with the runs and nodes that it knew before.

        Raises:
            PipelineError: It does not start.
        """
        options = ["--port", str(self._port), "--database", str(self.folder / "superlink.db")]
        options += ["--disable-runtime-dependency-installation"]
        if self._authenticate:
            options.append("--enable-supernode-auth")
        if self._simulated_nodes:
            options.append("--simulation")
        if self._certificates:
            pairs = {"ca-certfile": "ca.crt", "certfile": "server.pem", "keyfile": "server.key"}
            options += [word for key, file in pairs.items() for word in (f"--ssl-{key}", self._certificate(file))]
        else:
            options.append("--insecure")
        self._write_connection()
        self._start("superlink", "flower-superlink", *options)
        self._wait_for_port("superlink")

    def start_node(self, client_id: int, project: Path, *options: str, **config: Any) -> str:
        """Start a SuperNode.

        Args:
            client_id: For its --node-config.
            project: Its project folder, in which it runs.
            options: More options of flower-supernode.
            config: More values of its --node-config.

        Returns:
            The name of the process, for `stop`.
        """
        values = {"client-id": client_id, "project": str(project), **config}
        line = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        security = ["--root-certificates", self._certificate("ca.crt")] if self._certificates else ["--insecure"]
        address = ["--superlink", f"127.0.0.1:{self._port}", "--port", str(free_port())]
        name = f"node-{client_id}"
        self._start(name, "flower-supernode", *address, *security, "--node-config", line, *options, cwd=project)
        return name

    def run(self, set_values: Mapping[str, Any] | None = None, **run_config: Any) -> int:
        """Start a run and return Flower's id of it.

        Args:
            set_values: Dotted keys of params.yaml and their values.
            run_config: Keys of [tool.flwr.app.config].

        Raises:
            PipelineError: Flower rejects it.
        """
        values = {"project": str(self.folder / "server"), **run_config}
        (self.folder / "server").mkdir(exist_ok=True)
        if set_values:
            values["set"] = " ".join(f"{key}={value}" for key, value in set_values.items())
        words = [word for key, value in values.items() for word in ("--run-config", f"{key}={json.dumps(value)}")]
        if self._simulated_nodes:
            nodes = f"num-supernodes={self._simulated_nodes} client-resources-num-cpus=1"
            words += ["--federation-config", nodes]
        answer = self._flwr("run", str(self._app), _CONNECTION, "--format", "json", *words)
        try:
            return int(json.loads(answer[answer.index("{") :])["run-id"])
        except (ValueError, KeyError, TypeError):
            raise PipelineError(f"Flower did not start the run: {answer.strip()}") from None

    def wait(self, run_id: int, seconds: float) -> str:
        """Wait until a run has ended, and return "finished:completed" or "finished:failed".

        Raises:
            PipelineError: It takes longer than `seconds`.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._flwr("log", str(run_id), _CONNECTION, "--stream", timeout=left)  # ends when the run does
            status = self.status(run_id)
            if status.startswith("finished"):
                return status
            time.sleep(_POLL_SECONDS)
        raise PipelineError(f"the run has not ended within {seconds:g} s. See the logs in {self.folder / 'logs'}.")

    def status(self, run_id: int) -> str:
        """Return the status of a run."""
        answer = self._flwr("list", _CONNECTION, "--run-id", str(run_id), "--format", "json")
        return str(json.loads(answer[answer.index("{") :])["runs"][0]["status"])

    def log(self, run_id: int) -> str:
        """Return the log of the run's ServerApp so far."""
        return self._flwr("log", str(run_id), _CONNECTION, "--show")

    def register(self, public_key: Path) -> None:
        """Register the public key of a node."""
        self._flwr("supernode", "register", str(public_key), _CONNECTION)

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Terminate a process and those that it started."""
        process = self._processes.pop(name)
        for number in (how, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                pass
            return

    def _start(self, name: str, program: str, *words: str, cwd: Path | None = None) -> None:
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [self._program(program), *words],
                cwd=cwd or self.folder,
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _flwr(self, *words: str, timeout: float | None = None) -> str:
        done = subprocess.run(
            [self._program("flwr"), *words],
            cwd=self.folder,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return done.stdout + done.stderr

    def _environment(self) -> dict[str, str]:
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        path = os.pathsep.join([*self._path, os.environ.get("PATH", "")])
        return {**os.environ, **quiet, "FLWR_HOME": str(self.folder / "flwr"), "PATH": path}

    def _program(self, name: str) -> str:
        return shutil.which(name, path=os.pathsep.join(self._path)) or name

    def _write_connection(self) -> None:
        security = f'root-certificates = "{self._certificate("ca.crt")}"' if self._certificates else "insecure = true"
        (self.folder / "flwr").mkdir(exist_ok=True)
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n'
            f'[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{self._port}"\n{security}\n'
        )

    def _certificate(self, name: str) -> str:
        assert self._certificates
        return str(self._certificates / name)

    def _wait_for_port(self, name: str) -> None:
        for _ in range(200):
            if self._processes[name].poll() is not None:
                break
            with socket.socket() as probe:
                probe.settimeout(_POLL_SECONDS)
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(_POLL_SECONDS)
        raise PipelineError(f"the {name} does not start. See {self.folder / 'logs' / name}.log.")


def free_port() -> int:
    """Return a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
