"""The one exception that reaches users: it says what is wrong, where and what to do; shown without a traceback."""


class PipelineError(Exception):
    """A mistake or fault that the user can act on."""
