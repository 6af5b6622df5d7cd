"""The sweep of timesteps and layers on a sample of images, and which to take -> analysis/sweep."""

from stages.analyze_features.sweep.run import run

__all__ = ["run"]
