"""The command line: `commands` has a command per stage, `features` the group `pipeline features`."""

from pipeline.cli.commands import main

__all__ = ["main"]
