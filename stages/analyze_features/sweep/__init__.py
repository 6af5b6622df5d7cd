"""Sweep timesteps and layers on a sample of images, and recommend a choice -> analysis/sweep."""

from stages.analyze_features.sweep.run import run

__all__ = ["run"]
