"""Finished timesteps of a sweep, so that an interrupted sweep resumes with identical results.

    .pipeline/sweep/<key>/t-00300.safetensors

The key covers everything that determines a timestep's numbers, so changed settings never reuse old results. The list of
timesteps and the rule of the choice are not part of it: the last finished sweep's folder is kept, for more timesteps or
another rule, and folders of other keys are removed when a sweep finishes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.io import atomic
from pipeline.io.resumable import ResumableStore
from stages.analyze_features.probes import Scores
from stages.analyze_features.sweep.recommend import Candidate


@dataclass(frozen=True)
class SweepResult:
    """The result of one timestep."""

    candidates: list[Candidate]  # the sets of layers that were evaluated
    own_layers: list[str]  # those that "auto" selects
    colours: dict[str, np.ndarray]  # layer -> uint8 (p, h, w, 3), maps of p images as colours


class SweepCache:
    """Results of the finished timesteps of one key."""

    def __init__(self, folder: Path) -> None:
        """Cache in `folder`, which is created by the first `save`."""
        self.folder, self._store = folder, ResumableStore(folder)

    def load(self, timestep: int) -> SweepResult | None:
        """Return the result of a timestep, or None if it is missing or damaged."""
        unit = self._store.load(f"t-{timestep:05d}")
        if unit is None:
            return None
        colours, meta = unit
        candidates = [Candidate(**row | {"scores": Scores(**row["scores"])}) for row in meta["candidates"]]
        return SweepResult(candidates, meta["own_layers"], {layer: maps.numpy() for layer, maps in colours.items()})

    def save(self, timestep: int, result: SweepResult) -> None:
        """Store the result of a timestep."""
        meta = {"candidates": [asdict(row) for row in result.candidates], "own_layers": result.own_layers}
        colours = {layer: torch.from_numpy(maps) for layer, maps in result.colours.items()}
        self._store.save(f"t-{timestep:05d}", colours, meta)

    def remove_others(self) -> None:
        """Remove the folders of all other keys, because this sweep is finished."""
        for folder in self.folder.parent.iterdir():
            if folder != self.folder:
                atomic.remove(folder)
