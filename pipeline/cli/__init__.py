"""The command line: `commands` has a command per stage, `features` the group `pipeline features`."""

import signal
import threading

# Ctrl-C during the imports ends the program without a traceback; from then on, the commands handle it.
_quiet = threading.current_thread() is threading.main_thread()
_quiet = _quiet and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _quiet:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from pipeline.cli.commands import main  # noqa: E402

if _quiet:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["main"]
