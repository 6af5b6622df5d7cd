"""Figures of analyze-features and sweep-features for the report, if they belong to the runs' features or images.

They are embedded as data URIs in <img>, because the files may come from elsewhere, and an image runs no script.
"""

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.io.system_errors import entries, reading
from pipeline.settings.config import at
from stages.report.results import Results

_OF_SET = {
    "clusters.svg": "Linear probe and clusters by layer",
    "prompts.svg": "Matching and other prompts",
    "tsne.svg": "t-SNE by layer",
}
_OF_SWEEP = {"sweep.svg": "Timesteps and layers", "maps-*.png": "Feature maps of one image, by timestep"}
_MIME = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass
class Analysis:
    """Figures to show, as caption -> data URI."""

    of_set: dict[str, str] = field(default_factory=dict)  # of analyze-features
    verdict: list[str] = field(default_factory=list)  # its sentences
    of_sweep: dict[str, str] = field(default_factory=dict)  # of sweep-features
    recommended: str = ""  # the preset that the sweep recommends
    omitted: list[str] = field(default_factory=list)  # results of the two that are not shown, with the reason


def read(root: Path, results: Results, with_sweep: bool) -> Analysis:
    """Read analysis/ of the project, and analysis/sweep if asked to. A stage without results contributes nothing."""
    used = {run.settings.features for run in results.all_runs} - {None}
    folder, found = root / "analysis", Analysis()
    if used and (analysed := _text_at(folder / "details.json", "feature_set.fingerprint")):
        if analysed in used:
            found.of_set = _pictures(folder, _OF_SET)
            found.verdict = _texts_at(folder / "details.json", "verdict")
        else:
            described = f"analysis/ describes feature set {analysed[:8]}, which no run was trained on"
            found.omitted.append(f"{described}. Run `pipeline analyze-features`")
    if with_sweep and (swept := _text_at(folder / "sweep" / "sweep.json", "made_of.dataset.hash")):
        if swept == results.all_runs[0].settings.dataset.hash:
            found.of_sweep = _pictures(folder / "sweep", _OF_SWEEP)
            found.recommended = (_content(folder / "sweep" / "recommended.yaml") or b"").decode("utf-8", "replace")
        else:
            described = "analysis/sweep describes another data set than the one the runs were trained on"
            found.omitted.append(f"{described}. Run `pipeline sweep-features`")
    return found


def _text_at(file: Path, key: str) -> str | None:
    """Return the text at a dotted key of a JSON file, or None if there is no such file or text."""
    found = _value_at(file, key)
    return found if isinstance(found, str) else None


def _texts_at(file: Path, key: str) -> list[str]:
    found = _value_at(file, key)
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def _value_at(file: Path, key: str) -> Any:
    try:
        return at(json.loads(_content(file) or b""), key)
    except (ValueError, RecursionError):  # not JSON, or nested too deeply
        return None


def _pictures(folder: Path, captions: dict[str, str]) -> dict[str, str]:
    """Return caption -> data URI of the first file that matches each pattern."""
    found = {}
    for pattern, caption in captions.items():
        file = next((file for file in entries(folder) if file.match(pattern)), None)
        if file and (data := _content(file)):
            found[caption] = f"data:{_MIME[file.suffix]};base64,{base64.b64encode(data).decode()}"
    return found


def _content(file: Path) -> bytes | None:
    try:
        with reading(file):
            return file.read_bytes()
    except OSError:  # no such file
        return None
