"""A node's view of a run: which client it is, where its data are, and the settings of the run.

--node-config   the node's own settings: client-id, name, project, device, threads
--run-config    the run's: method, partition, seed, set
params.yaml     everything else, from Flower's app bundle: the same on every node
"""

import functools
import logging
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict

import pipeline
from pipeline.errors import ConfigError, PipelineError
from pipeline.settings import config
from pipeline.settings.config import Config

log = logging.getLogger(__name__)

PARAMS = Path(pipeline.__file__).parents[1] / "params.yaml"
"""The run's settings, which Flower's app bundle holds beside the code."""

REFUSED = 100
"""Code of the error with which a node refuses a request; the error gives the reason."""


@dataclass(frozen=True)
class Node:
    """One client of the federation."""

    client_id: int  # counted from 0; a key of its random draws
    name: str  # in messages
    root: Path  # its project folder, with data/, models/ and .pipeline/
    device: str | None  # where it trains; None: as params.yaml says
    threads: int = 1  # per operation on a CPU

    def __str__(self) -> str:
        """Return its name in messages."""
        return f"client {self.client_id} ({self.name})"


def node_of(context: Context) -> Node:
    """Return the node that a ClientApp runs on; raise ConfigError if its --node-config is incomplete or wrong."""
    options = context.node_config
    client_id = options.get("client-id", options.get("partition-id"))  # the latter comes from Flower's simulation
    if not isinstance(client_id, int) or client_id < 0:
        raise ConfigError(
            "the SuperNode has no client-id. Start it with --node-config 'client-id=0 project=\"/path\"'."
        )
    folder = options.get("project") or str(context.run_config.get("clients", "")).format(client_id=client_id)
    if not folder:
        raise ConfigError(f'client {client_id} has no project folder. Add project="/path" to its --node-config.')
    root = Path(str(folder)).expanduser().resolve()
    if not root.is_dir():
        raise ConfigError(f"project folder {root} of client {client_id} does not exist. Fix project in --node-config.")
    device, threads = options.get("device"), options.get("threads", 1)
    if type(threads) is not int or threads < 1:
        raise ConfigError(f"threads={threads!r} in --node-config is invalid. Use an integer, 1 or more.")
    name = str(options.get("name", f"node {client_id}"))
    return Node(client_id, name, root, str(device) if device else None, threads)


def config_of(run_config: Mapping[str, Any], root: Path, device: str | None = None) -> Config:
    """Return the run's configuration for a project folder; raise ConfigError if params.yaml or `set` is invalid."""
    try:
        assignments = shlex.split(str(run_config.get("set", "")))
    except ValueError as error:
        raise ConfigError(f"cannot parse --run-config set={run_config['set']!r} ({error}). Fix its quotes.") from None
    overrides = config.parse_overrides(assignments)
    if device:
        overrides["runtime.device"] = device
    return Config(config.load(PARAMS, overrides).params, root)


def project_of(run_config: Mapping[str, Any]) -> Path:
    """Return the server's project folder; raise ConfigError if it does not exist."""
    root = Path(str(run_config["project"])).expanduser().resolve()
    if not root.is_dir():
        raise ConfigError(f"project folder {root} does not exist on the server. Fix project in --run-config.")
    return root


def seed_of(run_config: Mapping[str, Any]) -> int:
    """Return the run's seed; raise ConfigError if it is not an integer, or negative."""
    seed = run_config.get("seed")
    if not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"--run-config seed={seed!r} is invalid. Use an integer, 0 or more.")
    return seed


def answering(task: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    """Wrap `task` as a handler of a ClientApp, which replies with the result or a one-line error.

    Unexpected errors propagate to Flower, which replies for the node.
    """

    @functools.wraps(task)
    def handle(message: Message, context: Context) -> Message:
        name: object = f"node {context.node_id}"
        try:
            name = node_of(context)
            return Message(task(message, context), reply_to=message)
        except PipelineError as error:
            reason = str(error)
        except OSError as error:
            if error.errno is None:
                raise
            reason = f"{os.strerror(error.errno)} ({error.filename})" if error.filename else os.strerror(error.errno)
        log.error("%s: %s", name, reason)
        return Message(Error(REFUSED, f"{name}: {reason}"), reply_to=message)

    return handle
