"""The Flower app that `flwr run` starts on the server and on every node. Like the command line, it calls one stage.

The run's `task` selects it: `train` is stage 2 (stages/train_fl/engines/flower), `basis` the federated part of stage 1
(stages/extract_features/federated). Each has a `server` with serve(grid, run_config) and a `client` with a function per
message type. They are imported on demand, so a node loads only its own part.
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

from pipeline import memory, threads
from pipeline.errors import ConfigError, PipelineError
from pipeline.federation.node import answering

_TASKS = {"train": "stages.train_fl.engines.flower", "basis": "stages.extract_features.federated"}

server_app = ServerApp()
client_app = ClientApp()
log = logging.getLogger(__name__)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the task. An error is logged on one line, and the run ends as failed."""
    with _run_log():
        try:
            _part(context, "server").serve(grid, context.run_config)
        except PipelineError as error:
            log.error("Error: %s", error)
            raise


@contextlib.contextmanager
def _run_log() -> Iterator[None]:
    """Send the log messages of this project to the run's log, and not those of other libraries."""
    handler = logging.StreamHandler(sys.stdout)
    ours, flower = [logging.getLogger(name) for name in ("pipeline", "stages")], logging.getLogger("flwr")
    for logger in ours:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    flower.addFilter(_without_traceback)  # stays: Flower logs how the app ended after this block
    try:
        yield
    finally:
        for logger in ours:
            logger.removeHandler(handler)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Drop the traceback with which Flower logs an error that was reported already."""
    if record.exc_info and isinstance(record.exc_info[1], PipelineError):
        record.exc_info = None
    return True


def privacy(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Apply Flower's mods for differential privacy, as the run's params.yaml asks for."""
    return _part(context, "privacy").protect(message, context, call_next)


def _handler(name: str) -> ClientAppCallable:
    """Return a handler that calls the function of this name in the task's `client`."""

    @answering
    def handle(message: Message, context: Context) -> RecordDict:
        return getattr(_part(context, "client"), name)(message, context)

    return handle


client_app.train(mods=[privacy])(_handler("train"))
client_app.evaluate()(_handler("evaluate"))
for _question in ("join", "forget", "moments", "pooled", "basis"):
    client_app.query(_question)(_handler(_question))


def _part(context: Context, name: str) -> Any:
    threads.sleep_while_waiting()  # before torch is loaded
    memory.keep_freed()
    importlib.import_module("stages.train_fl.methods")  # registers the methods' settings
    task = str(context.run_config.get("task"))
    if task not in _TASKS:
        raise ConfigError(f"unknown --run-config task={task!r}. Use one of {', '.join(_TASKS)}.")
    return importlib.import_module(f"{_TASKS[task]}.{name}")
