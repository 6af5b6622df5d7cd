"""The errors that reach users: one base class, and a kind for each thing that callers may want to handle.

Each message is one line: what is wrong, where, and what to do. The command line prints it without a traceback.
"""


class PipelineError(Exception):
    """Base class of every error that a user can act on."""


class ConfigError(PipelineError):
    """A setting or an argument is invalid, or settings contradict each other."""


class DataError(PipelineError):
    """Images, a data set, a model or a finished run is missing, invalid or not the one that the settings name."""


class FeatureSetError(PipelineError):
    """A feature set is missing, incomplete, damaged, or does not fit the data and settings."""


class TrainingDiverged(PipelineError):
    """A loss is not a finite number."""
