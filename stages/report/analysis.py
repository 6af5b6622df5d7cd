"""What analyze-features and sweep-features found: pictures for the report, if of the runs' features or images.

Pictures go into the page as data URIs, not as elements: a picture is a file that came from elsewhere, and an image
runs no script. It follows light and dark by itself.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.io.system_errors import entries, reading
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

    of_set: dict[str, str]
    of_sweep: dict[str, str]
    recommended: str
    left_out: list[str]


def read(root: Path, results: Results, with_sweep: bool) -> Analysis:
    """Reads analysis/; if a stage has not run, or was killed, there is nothing of it.

    Args:
        root: the project's folder.
        results: the runs of the report.
        with_sweep: also what sweep-features found.

    Raises:
        SystemRefusal: the operating system did not let a file be read.
    """
    used = {run.config["features"] for run in results.all_runs} - {None}
    folder, left_out = root / "analysis", []
    of_set: dict[str, str] = {}
    of_sweep: dict[str, str] = {}
    recommended = ""
    if used and (analysed := _found(folder / "details.json", "feature_set", "fingerprint")):
        if analysed in used:
            of_set = _pictures(folder, _OF_SET)
        else:
            left_out.append(
                f"analysis/ is of the feature set {analysed[:8]}, and no run was trained from that: run "
                "`pipeline analyze-features`"
            )
    if with_sweep and (swept := _found(folder / "sweep" / "sweep.json", "made_of", "dataset", "hash")):
        if swept == results.all_runs[0].config["dataset"]["hash"]:
            of_sweep = _pictures(folder / "sweep", _OF_SWEEP)
            recommended = (_bytes(folder / "sweep" / "recommended.yaml") or b"").decode("utf-8", "replace")
        else:
            left_out.append(
                "analysis/sweep is of another data set than the runs were trained on: run `pipeline sweep-features`"
            )
    return Analysis(of_set, of_sweep, recommended, left_out)


def _found(file: Path, *keys: str) -> str | None:
    """Text at the end of these keys of a JSON file, or None."""
    try:
        with reading(file):
            found: Any = json.loads(file.read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def _pictures(folder: Path, captions: dict[str, str]) -> dict[str, str]:
    """Of each pattern the first file, if there is one."""
    found = {}
    for pattern, caption in captions.items():
        for file in [file for file in entries(folder) if file.match(pattern)][:1]:
            if data := _bytes(file):
                found[caption] = f"data:{_MIME[file.suffix]};base64,{base64.b64encode(data).decode()}"
    return found


def _bytes(file: Path) -> bytes | None:
    try:
        with reading(file):
            return file.read_bytes()
    except OSError:  # there is none
        return None
