"""A choice among a sweep's candidates in words, for the log, and as a preset."""

import json
from collections.abc import Mapping
from typing import Any

from stages.analyze_features.sweep.recommend import Choice

_MANY = 0.1  # of the candidates


def as_preset(choice: Choice, of: str, rests_on: str, share: float, measured: Mapping[str, Any]) -> str:
    """YAML in the presets' format, whose first line says what it is.

    Args:
        choice: what to take.
        of: what it is for: data set and model.
        rests_on: a sentence on the images that it was judged on.
        share: of the variance that the dimensions explain.
        measured: the other keys of extract_features that the choice was measured with, and holds for.
    """
    taken = choice.recommended
    lines = [
        f"By `pipeline sweep-features` for {of}: {taken.scores_in_words()}.",
        f"{rests_on} ± is one standard error; the best of many is flattered.",
        f"Dims explain {100 * share:g} % of a layer's variance.",
        *in_words(choice)[1:],
    ]
    return (
        "".join(f"# {line}\n" for line in lines)
        + "extract_features:\n"
        + f"  timestep: {taken.timestep}\n"
        + f"  layers: [{', '.join(taken.layers)}]\n"
        + f"  dims: [{', '.join(map(str, taken.dims))}]\n"
        + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in measured.items())
    )


def in_words(choice: Choice) -> list[str]:
    """The choice, how well it is told from the rest, and what one criterion alone would take, a line each."""
    lines = [f"recommended: {choice.recommended.in_words()}", *_told_apart(choice)]
    if choice.by_prompts:
        lines += [f"by the probe alone: {choice.by_probe.in_words()}"]
        lines += [f"by the prompts alone: {choice.by_prompts.in_words()}"]
    return lines


def hint(choice: Choice, unused: int) -> list[str]:
    """A line on what would tell more candidates apart, where many are left and `unused` training images are there."""
    if not unused or choice.near_both <= max(1, _MANY * choice.candidates):
        return []
    return [
        f"more images would tell more of them apart, four times as many halve an error: {unused:,} training images are "
        "unused (--images, --margin-images)"
    ]


def _told_apart(choice: Choice) -> list[str]:
    allowed = f"{choice.standard_errors:g}"
    said = (
        f"{choice.near_probe} of {choice.candidates} candidates are within {allowed} standard "
        f"error{'' if allowed == '1' else 's'} of the best probe"
    )
    if choice.by_prompts:
        said += f", {choice.near_both} of these within {allowed} of the best of them by prompts"
    if choice.near_both == 1:
        return [said]
    return [said, f"these {choice.near_both} are not told apart: the fewest layers, then the fewest dims, decided"]
