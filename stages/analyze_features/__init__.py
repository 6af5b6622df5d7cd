"""Stage analyze-features: what the representations hold -> analysis/; and the sweep that chooses among them."""

from stages.analyze_features.run import run
from stages.analyze_features.sweep import run as sweep

__all__ = ["run", "sweep"]
