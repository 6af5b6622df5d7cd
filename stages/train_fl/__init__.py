"""Stage train-fl: one federated run from images and cached features -> results/<run>. Never imports diffusers."""

from stages.train_fl.run import run

__all__ = ["run"]
