"""Stage analyze-features: measure the cached features -> analysis/.

Its sweep, `stages.analyze_features.sweep.run`, runs the frozen model; the stage itself imports without it.
"""

from stages.analyze_features.run import run

__all__ = ["run"]
