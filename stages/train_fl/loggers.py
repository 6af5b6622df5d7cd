"""Who watches a run besides its tables: the terminal, TensorBoard, DVCLive; each by one key of `runtime`.

A logger gets the rows of rounds.csv, with the round's seconds. It is begun anew with every start of a run and told the
rounds that an earlier start has done, so that a resumed run leaves one curve without gaps or doubles.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Protocol

from pipeline.errors import PipelineError
from pipeline.settings.config import Config
from stages.train_fl.records import RunRecord

Values = dict[str, float]


class Logger(Protocol):
    """Gets every round of one run."""

    def log(self, number: int, values: Values) -> None:
        """One round, counted from 1; `values` are named as in rounds.csv."""

    def close(self) -> None:
        """After the last round, or when the run is stopped."""


@contextlib.contextmanager
def watching(config: Config, run_name: str, record: RunRecord) -> Iterator[Callable[[], None]]:
    """The loggers that `runtime` switches on; gives a function that tells them of the record's last round.

    Raises:
        PipelineError: a logger's library is not installed.
    """
    runtime, terminal = config.params.runtime, Terminal()
    others: list[Logger] = []
    with contextlib.ExitStack() as stack:
        if runtime.tensorboard:
            others.append(TensorBoard(config.home / "tensorboard" / run_name))
            stack.callback(others[-1].close)
        if runtime.dvclive:
            others.append(DVCLive(config.home / "dvclive" / run_name))
            stack.callback(others[-1].close)
        for logger in others:
            for number, values in enumerate(record.values(), start=1):
                logger.log(number, values)

        def tell() -> None:
            *_, last = rounds = list(record.values())
            for logger in (terminal, *others):
                logger.log(len(rounds), last)

        yield tell


class Terminal:
    """A line a round, above the progress bar; nothing where standard error is no terminal."""

    def __init__(self) -> None:
        """Writes the heading with the first round."""
        self._begun = not sys.stderr.isatty()
        self._silent = self._begun

    def log(self, number: int, values: Values) -> None:
        """Writes the round's line."""
        from tqdm import tqdm

        if self._silent:
            return
        if not self._begun:
            tqdm.write(f"{'round':>6}{'accuracy':>11}{'loss':>10}{'train loss':>12}{'seconds':>10}", file=sys.stderr)
            self._begun = True
        train_loss = sum(value for name, value in values.items() if name.startswith("train_"))
        line = f"{number:>6}{100 * values['accuracy']:>9.2f} %{values['loss']:>10.4f}"
        tqdm.write(f"{line}{train_loss:>12.4f}{values['seconds']:>10.2f}", file=sys.stderr)

    def close(self) -> None:
        """Nothing is left open."""


class TensorBoard:
    """Event files for `tensorboard --logdir tensorboard`."""

    def __init__(self, folder: Path) -> None:
        """Starts anew in `folder`."""
        _remove_events(folder)
        self._writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder))

    def log(self, number: int, values: Values) -> None:
        """One scalar a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class DVCLive:
    """Tables for `dvc plots show dvclive/<run>/plots` and DVC's VS Code view; changes neither dvc.yaml nor git."""

    def __init__(self, folder: Path) -> None:
        """Starts anew in `folder`."""
        live = _import("dvclive", "dvclive").Live
        self._live = live(str(folder), resume=False, report=None, save_dvc_exp=False, dvcyaml=None)

    def log(self, number: int, values: Values) -> None:
        """One metric a value, at step `number`."""
        self._live.step = number
        for name, value in values.items():
            self._live.log_metric(name, value)
        self._live.make_summary()

    def close(self) -> None:
        """Writes what is left."""
        self._live.end()


def _remove_events(folder: Path) -> None:
    for file in folder.glob("events.out.tfevents.*"):
        file.unlink()


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise PipelineError(
            f"runtime.{package} is true, but {package} is not installed: pip install {package}, or set it to false"
        ) from None
