"""The Flower app: what `flwr run` starts on the server and on every node. Like the CLI, it calls one stage.

The run's `task` says which: `train` is stage 2 (stages/train_fl/engines/flower), `basis` the federated part of stage 1
(stages/extract_features/federated). Each has a `server` with serve(grid, run_config) and a `client` with a function a
message type. They are imported when they are needed: a node loads no more than its part.
"""

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp

from pipeline.errors import PipelineError
from pipeline.federation.node import answering

_TASKS = {"train": "stages.train_fl.engines.flower", "basis": "stages.extract_features.federated"}

server_app = ServerApp()
client_app = ClientApp()
log = logging.getLogger(__name__)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Runs the task; a mistake or fault is one line, and the run ends as failed."""
    with _speaking():
        try:
            _part(context, "server").serve(grid, context.run_config)
        except PipelineError as error:
            log.error("Error: %s", error)
            raise


@contextlib.contextmanager
def _speaking() -> Iterator[None]:
    """Our own words, and Flower's, go to the run's log; those of the libraries below do not."""
    handler = logging.StreamHandler(sys.stdout)
    ours, flower = [logging.getLogger(name) for name in ("pipeline", "stages")], logging.getLogger("flwr")
    for logger in ours:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    flower.addFilter(_without_traceback)  # stays: Flower's word on how it ended comes later
    try:
        yield
    finally:
        for logger in ours:
            logger.removeHandler(handler)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Flower logs what ends a ServerApp with its traceback, which says nothing of a mistake that is named already."""
    if record.exc_info and isinstance(record.exc_info[1], PipelineError):
        record.exc_info = None
    return True


def privacy(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower's mods for differential privacy and secure aggregation, as the run's params.yaml asks for them."""
    return _part(context, "privacy").protect(message, context, call_next)


def _handler(name: str) -> ClientAppCallable:
    """What answers a message: the function of this name in the task's `client`."""

    @answering
    def handle(message: Message, context: Context) -> RecordDict:
        return getattr(_part(context, "client"), name)(message, context)

    return handle


client_app.train(mods=[privacy])(_handler("train"))
client_app.evaluate()(_handler("evaluate"))
for _question in ("join", "forget", "moments", "pooled", "basis"):
    client_app.query(_question)(_handler(_question))


def _part(context: Context, name: str) -> Any:
    importlib.import_module("stages.train_fl.methods")  # registers the methods' settings
    task = str(context.run_config.get("task"))
    if task not in _TASKS:
        raise PipelineError(f"--run-config task={task!r}: there are {', '.join(_TASKS)}")
    return importlib.import_module(f"{_TASKS[task]}.{name}")
