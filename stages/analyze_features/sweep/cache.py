"""Timesteps of a sweep that are done: a killed one goes on from there, to the same bytes.

    .pipeline/sweep/<key>/t-00300.json    what came of a timestep, and the SHA-256 of it

A folder is keyed by all that decides the numbers, so that whoever changes a setting finds nothing of the old ones; the
list of timesteps and the rule of the choice do not decide them. So the last finished sweep's folder stays, for another
rule or more timesteps; only those of other keys are dropped then. Each file is written under another name, synced and
renamed. What is damaged is computed again.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import provenance
from pipeline.io import atomic
from pipeline.io.system_errors import reading
from stages.analyze_features.probes import Scores
from stages.analyze_features.sweep.recommend import Candidate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swept:
    """What comes of one timestep.

    Attributes:
        candidates: what was judged.
        own_layers: those of the layers that "auto" stands for.
        colours: layer -> uint8 (p, h, w, 3), maps of p images as colours.
    """

    candidates: list[Candidate]
    own_layers: list[str]
    colours: dict[str, np.ndarray]


class Kept:
    """The timesteps kept in a folder."""

    def __init__(self, folder: Path) -> None:
        """Kept in `folder`, which is made when first needed."""
        self._folder = folder

    def load(self, timestep: int) -> Swept | None:
        """What came of this timestep, or None if it is not there whole.

        Raises:
            SystemRefusal: the operating system did not let it be read.
        """
        file = self._file(timestep)
        try:
            with reading(file):
                stored = json.loads(file.read_text(encoding="utf-8"))
            if provenance.fingerprint(stored["content"]) != stored["sha256"]:
                raise ValueError("not what was written")
            return _swept(stored["content"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("%s cannot be used (%s): sweeping timestep %d again", file, error, timestep)
            return None

    def save(self, timestep: int, swept: Swept) -> None:
        """Keeps what came of a timestep."""
        self._folder.mkdir(parents=True, exist_ok=True)
        content = {
            "candidates": [asdict(candidate) for candidate in swept.candidates],
            "own_layers": swept.own_layers,
            "colours": {layer: colours.tolist() for layer, colours in swept.colours.items()},
        }
        text = json.dumps({"sha256": provenance.fingerprint(content), "content": content})
        with atomic.replace_file(self._file(timestep)) as temporary:
            temporary.write_text(text, encoding="utf-8")
            atomic.sync_to_disk(temporary)

    def remove_others(self) -> None:
        """Drops the folders of all other keys: this sweep is finished."""
        for folder in self._folder.parent.iterdir():
            if folder != self._folder:
                atomic.remove(folder)

    def _file(self, timestep: int) -> Path:
        return self._folder / f"t-{timestep:05d}.json"


def _swept(content: dict[str, Any]) -> Swept:
    candidates = [Candidate(**row | {"scores": Scores(**row["scores"])}) for row in content["candidates"]]
    colours = {layer: np.array(values, np.uint8) for layer, values in content["colours"].items()}
    return Swept(candidates, content["own_layers"], colours)
