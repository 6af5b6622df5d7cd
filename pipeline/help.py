"""Help texts of the command line."""

from typing import Any

import click


class ExamplesAsWritten(click.Command):
    """Keeps the lines of a help text's examples: click's mark for that, in a raw docstring, is two characters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Puts the mark in."""
        super().__init__(*args, **kwargs)
        self.help = self.help and self.help.replace("\\b\n", "\b\n")
