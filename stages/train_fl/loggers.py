"""Loggers for a run: terminal, TensorBoard and DVCLive, each enabled by a `runtime` key.

A logger gets the rows of rounds.csv, with the seconds of each round. Every start of a run creates its loggers again and
repeats the rounds of earlier starts, so that a resumed run leaves one curve without gaps or duplicates.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from pipeline.errors import ConfigError
from pipeline.settings.params import Runtime
from stages.train_fl.records import RunRecord

Values = dict[str, float]


@contextlib.contextmanager
def opened(runtime: Runtime, home: Path, run_name: str, record: RunRecord) -> Iterator[Callable[[], None]]:
    """Yield a function that logs the last round of `record` with every logger that `runtime` enables.

    The loggers write to tensorboard/<run_name> and dvclive/<run_name> in the folder `home`. A logger whose library is
    not installed raises ConfigError.
    """
    terminal, others = Terminal(), list[TensorBoard | DVCLive]()
    with contextlib.ExitStack() as stack:
        if runtime.tensorboard:
            others.append(TensorBoard(home / "tensorboard" / run_name))
            stack.callback(others[-1].close)
        if runtime.dvclive:
            others.append(DVCLive(home / "dvclive" / run_name))
            stack.callback(others[-1].close)
        for logger in others:
            for number, values in enumerate(record.values(), start=1):
                logger.log(number, values)

        def log_last_round() -> None:
            *_, last = rounds = record.values()
            for logger in (terminal, *others):
                logger.log(len(rounds), last)

        yield log_last_round


class Terminal:
    """One line per round above the progress bar; nothing where standard error is not a terminal."""

    def __init__(self) -> None:
        """Write nothing yet: the heading comes with the first round."""
        self._silent, self._started = not sys.stderr.isatty(), False

    def log(self, number: int, values: Values) -> None:
        """Write the line of a round."""
        from tqdm import tqdm

        if self._silent:
            return
        if not self._started:
            tqdm.write(f"{'round':>6}{'accuracy':>11}{'loss':>10}{'train loss':>12}{'seconds':>10}", file=sys.stderr)
            self._started = True
        train_loss = sum(value for name, value in values.items() if name.startswith("train_"))
        line = f"{number:>6}{100 * values['accuracy']:>9.2f} %{values['loss']:>10.4f}"
        tqdm.write(f"{line}{train_loss:>12.4f}{values['seconds']:>10.2f}", file=sys.stderr)


class TensorBoard:
    """Event files for `tensorboard --logdir tensorboard`."""

    def __init__(self, folder: Path) -> None:
        """Replace the events in `folder`."""
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
        self._writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder))

    def log(self, number: int, values: Values) -> None:
        """Write one scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class DVCLive:
    """Tables for `dvc plots show dvclive/<run>/plots` and DVC's VS Code view; changes neither dvc.yaml nor git."""

    def __init__(self, folder: Path) -> None:
        """Replace the tables in `folder`."""
        live = _import("dvclive", "dvclive").Live
        self._live = live(str(folder), resume=False, report=None, save_dvc_exp=False, dvcyaml=None)

    def log(self, number: int, values: Values) -> None:
        """Write one metric per value, at step `number`."""
        self._live.step = number
        for name, value in values.items():
            self._live.log_metric(name, value)
        self._live.make_summary()

    def close(self) -> None:
        """Write what is buffered."""
        self._live.end()


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"{package} is not installed, but runtime.{package} is true. Run `pip install {package}`, or set the key "
            "to false."
        ) from None
