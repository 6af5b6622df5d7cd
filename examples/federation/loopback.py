"""A federation on this machine: one SuperLink and as many SuperNodes as wanted, real processes on loopback ports.

For the demo, the tests and the benchmark. Everything of it stands in one folder: Flower's own files under flwr/, what
every process says under logs/. Nothing outlives it: all processes are ended, gently and then not, at the end.
"""

import json
import os
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
    """A SuperLink, from `with` to its end, and the SuperNodes that are started beside it."""

    def __init__(
        self,
        folder: Path,
        app: Path,
        certificates: Path | None = None,
        authenticate: bool = False,
        simulated_nodes: int = 0,
    ) -> None:
        """Ready to start.

        Args:
            folder: for everything that the processes write.
            app: the project's clone, which Flower bundles and sends to the nodes.
            certificates: folder of ca.crt, server.pem and server.key for TLS; None: no TLS.
            authenticate: let in only nodes whose public key was registered.
            simulated_nodes: let Ray be so many nodes, instead of SuperNodes (needs flwr[simulation]).
        """
        self.folder, self._app, self._certificates, self._authenticate = folder, app, certificates, authenticate
        self._simulated_nodes = simulated_nodes
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._port = free_port()

    def __enter__(self) -> Self:
        """Starts the SuperLink and waits until it answers."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.start_superlink()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Ends every process."""
        for name in list(self._processes):
            self.stop(name)

    def start_superlink(self) -> None:
        """Starts the SuperLink; again after a `stop`, with all that it knew of runs and nodes.

        Raises:
            PipelineError: it does not come up.
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
        """Starts a SuperNode.

        Args:
            client_id: of its --node-config.
            project: its own folder, which it runs in.
            options: of flower-supernode besides.
            config: what else its --node-config says.

        Returns:
            The process's name, for `stop`.
        """
        told = {"client-id": client_id, "project": str(project), **config}
        line = " ".join(f"{key}={json.dumps(value)}" for key, value in told.items())
        security = ["--root-certificates", self._certificate("ca.crt")] if self._certificates else ["--insecure"]
        address = ["--superlink", f"127.0.0.1:{self._port}", "--port", str(free_port())]
        name = f"node-{client_id}"
        self._start(name, "flower-supernode", *address, *security, "--node-config", line, *options, cwd=project)
        return name

    def run(self, set_values: Mapping[str, Any] | None = None, **run_config: Any) -> int:
        """Starts a run; returns Flower's id of it.

        Args:
            set_values: dotted keys of params.yaml and their values.
            run_config: the keys of [tool.flwr.app.config].

        Raises:
            PipelineError: Flower does not take it.
        """
        told = {"project": str(self.folder / "server"), **run_config}
        (self.folder / "server").mkdir(exist_ok=True)
        if set_values:
            told["set"] = " ".join(f"{key}={value}" for key, value in set_values.items())
        words = [word for key, value in told.items() for word in ("--run-config", f"{key}={json.dumps(value)}")]
        if self._simulated_nodes:
            nodes = f"num-supernodes={self._simulated_nodes} client-resources-num-cpus=1"
            words += ["--federation-config", nodes]
        answer = self._flwr("run", str(self._app), _CONNECTION, "--format", "json", *words)
        try:
            return int(json.loads(answer[answer.index("{") :])["run-id"])
        except (ValueError, KeyError, TypeError):
            raise PipelineError(f"Flower did not start the run: {answer.strip()}") from None

    def wait(self, run_id: int, seconds: float) -> str:
        """Waits until a run has ended; "finished:completed" or "finished:failed".

        Raises:
            PipelineError: it takes longer.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.status(run_id)
            if status.startswith("finished"):
                return status
            time.sleep(10 * _POLL_SECONDS)  # asking is a process of its own, as heavy as a node's
        raise PipelineError(f"the run has not ended in {seconds:g} s: see {self.folder / 'logs'}")

    def status(self, run_id: int) -> str:
        """Flower's word for where a run stands."""
        answer = self._flwr("list", _CONNECTION, "--run-id", str(run_id), "--format", "json")
        return str(json.loads(answer[answer.index("{") :])["runs"][0]["status"])

    def log(self, run_id: int) -> str:
        """What the run's ServerApp said so far."""
        return self._flwr("log", str(run_id), _CONNECTION, "--show")

    def register(self, public_key: Path) -> None:
        """Lets in the node of this public key."""
        self._flwr("supernode", "register", str(public_key), _CONNECTION)

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends a process and those that it started."""
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
                [_program(program), *words],
                cwd=cwd or self.folder,
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _flwr(self, *words: str) -> str:
        done = subprocess.run(
            [_program("flwr"), *words], env=self._environment(), cwd=self.folder, capture_output=True, text=True
        )
        return done.stdout + done.stderr

    def _environment(self) -> dict[str, str]:
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, **quiet, "FLWR_HOME": str(self.folder / "flwr"), "PATH": path}

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
        raise PipelineError(f"the {name} does not come up: see {self.folder / 'logs' / name}.log")


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)
