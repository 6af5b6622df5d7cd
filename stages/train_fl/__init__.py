"""Stage train-fl: federated training from images and cached features. Never imports diffusers.

run        one run of params.yaml -> results/<method>-<partition>/s<seed>
estimate   what a run would do and cost
total      the time of several of them
simulate   training from arrays in memory, for notebooks: `Samples` in, `History` out
"""

from stages.train_fl.cost import estimate, total
from stages.train_fl.run import run
from stages.train_fl.simulation import History, Samples, simulate

__all__ = ["History", "Samples", "estimate", "run", "simulate", "total"]
