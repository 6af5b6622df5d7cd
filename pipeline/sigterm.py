"""SIGTERM, with which batch queues stop a job; a second one ends the process at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Terminated(SystemExit):
    """SIGTERM was received; a process that does not catch this exits with 143."""

    def __init__(self) -> None:
        """Set the exit code by the convention of shells, 128 + 15."""
        super().__init__(128 + signal.SIGTERM)


@contextlib.contextmanager
def on_sigterm(receive: Callable[[], None]) -> Iterator[None]:
    """Call `receive` when SIGTERM arrives inside the block; only the main thread can receive signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        receive()

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
