"""A node's view of a run: which client it is, where its data stand, and the settings that came with the run.

--node-config   this node's own: client-id, name, project, device
--run-config    the run's: method, partition, seed, set
params.yaml     all else: the one in the app's bundle, the same on every node
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
from pipeline.errors import PipelineError
from pipeline.settings import config
from pipeline.settings.config import Config

log = logging.getLogger(__name__)

PARAMS = Path(pipeline.__file__).parents[1] / "params.yaml"
"""The run's: in Flower's app bundle it stands beside the code."""

REFUSED = 100
"""Code of the error that a node answers with when it cannot do what is asked, and says why."""


@dataclass(frozen=True)
class Node:
    """One client of the federation.

    Attributes:
        client_id: which client it is, counted from 0; decides its random draws.
        name: for people.
        root: its project folder: data/, models/ and .pipeline/ below it.
        device: what it trains on; None: as params.yaml says.
    """

    client_id: int
    name: str
    root: Path
    device: str | None

    def __str__(self) -> str:
        """As messages name it."""
        return f"client {self.client_id} ({self.name})"


def node_of(context: Context) -> Node:
    """The node that a ClientApp runs on.

    Raises:
        PipelineError: its --node-config lacks something.
    """
    told = context.node_config
    client_id = told.get("client-id", told.get("partition-id"))  # the latter is what Flower's simulation gives
    if not isinstance(client_id, int) or client_id < 0:
        raise PipelineError("start the SuperNode with --node-config 'client-id=0 project=\"/path\"': no client-id")
    folder = told.get("project") or str(context.run_config.get("clients", "")).format(client_id=client_id)
    if not folder:
        raise PipelineError(f"start the SuperNode of client {client_id} with --node-config 'project=\"/path\"'")
    root = Path(str(folder)).expanduser().resolve()
    if not root.is_dir():
        raise PipelineError(f"{root}, the project of client {client_id}, is no folder: mend its --node-config")
    device = told.get("device")
    return Node(client_id, str(told.get("name", f"node {client_id}")), root, str(device) if device else None)


def config_of(run_config: Mapping[str, Any], root: Path, device: str | None = None) -> Config:
    """The run's configuration, for a project whose data stand under `root`.

    Raises:
        PipelineError: params.yaml or the run's `set` is wrong.
    """
    overrides = {}
    try:
        assignments = shlex.split(str(run_config.get("set", "")))
    except ValueError as error:
        raise PipelineError(f"--run-config set: {run_config['set']!r} cannot be read ({error})") from None
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not (key and equals):
            raise PipelineError(f"--run-config set: {assignment!r} is not KEY=VALUE")
        overrides[key] = config.parse_value(key, text)
    if device:
        overrides["runtime.device"] = device
    return Config(config.load(PARAMS, overrides).params, root)


def project_of(run_config: Mapping[str, Any]) -> Path:
    """The server's project folder.

    Raises:
        PipelineError: there is none.
    """
    root = Path(str(run_config["project"])).expanduser().resolve()
    if not root.is_dir():
        raise PipelineError(f"{root}, --run-config project, is no folder on the server")
    return root


def seed_of(run_config: Mapping[str, Any]) -> int:
    """The run's seed.

    Raises:
        PipelineError: it is no whole number from 0 on.
    """
    seed = run_config.get("seed")
    if not isinstance(seed, int) or seed < 0:
        raise PipelineError(f"--run-config seed={seed!r}: must be a whole number, 0 or more")
    return seed


def answering(task: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    """Makes of `task` what a ClientApp calls: it answers, or says in one line why it does not.

    An error that nobody foresaw goes on to Flower, which answers for the node and goes on.
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
