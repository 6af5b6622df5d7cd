"""What analyze-features and sweep-features found, for the report: their pictures, if they are of what the runs used.

Pictures go into the page as data URIs, not as elements: a picture is a file that came from elsewhere, and an image
runs no script. It follows light and dark by itself.
"""

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.report.results import Results

_OF_SET = {
    "clusters.svg": "Linear probe and clusters by layer",
    "prompts.svg": "Matching and other prompts",
    "tsne.svg": "t-SNE by layer",
}
_OF_SWEEP = {"sweep.svg": "Timesteps and layers", "maps-*.png": "One image's maps as colours, by timestep"}
_MIME = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Analysis:
    """Captions -> data URIs; the recommended preset, or ""; and what was found but left out, and why."""

    of_set: dict[str, str] = field(default_factory=dict)
    of_sweep: dict[str, str] = field(default_factory=dict)
    recommended: str = ""
    left_out: list[str] = field(default_factory=list)


def read(root: Path, results: Results) -> Analysis:
    """Reads analysis/; where a stage has not run, or was killed, there is nothing of it.

    Args:
        root: the project's folder.
        results: the runs of the report.
    """
    folder, left_out = root / "analysis", []
    of_set: dict[str, str] = {}
    of_sweep: dict[str, str] = {}
    recommended = ""
    if analysed := _found(folder / "features.json", "feature_set", "fingerprint"):
        if analysed in {run.config["features"] for run in results.all_runs}:
            of_set = _pictures(folder, _OF_SET)
        else:
            left_out.append(
                f"analysis/ is of the feature set {analysed[:8]}, and no run was trained from that: run "
                "`pipeline analyze-features`"
            )
    if swept := _found(folder / "sweep" / "sweep.json", "made_of", "dataset", "hash"):
        if swept == results.all_runs[0].config["dataset"]["hash"]:
            of_sweep = _pictures(folder / "sweep", _OF_SWEEP)
            recommended = "".join(file.read_text(encoding="utf-8") for file in folder.glob("sweep/recommended.yaml"))
        else:
            left_out.append(
                "analysis/sweep is of another data set than the runs were trained on: run `pipeline sweep-features`"
            )
    return Analysis(of_set, of_sweep, recommended, left_out)


def _found(file: Path, *keys: str) -> str | None:
    """Text at the end of these keys of a JSON file, or None."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _pictures(folder: Path, captions: dict[str, str]) -> dict[str, str]:
    """Of each pattern the first file, if there is one."""
    found = {}
    for pattern, caption in captions.items():
        for file in sorted(folder.glob(pattern))[:1]:
            data = base64.b64encode(file.read_bytes()).decode()
            found[caption] = f"data:{_MIME[file.suffix]};base64,{data}"
    return found
