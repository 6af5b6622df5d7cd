"""The one exception that reaches users: it says what is wrong, where, and what to do, and is shown without traceback."""


class PipelineError(Exception):
    """A mistake or fault that the user can act on."""
