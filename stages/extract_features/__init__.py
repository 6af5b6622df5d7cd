"""Stage extract-features: the frozen diffusion model, run once over a data set -> data/features/<set>."""

from stages.extract_features.cost import estimate
from stages.extract_features.run import run

__all__ = ["estimate", "run"]
