"""Choose a timestep, layers and PCA dimensions by validation images and prompts; the paper sets them by hand.

FedDifRC has two targets, which need different things. NDCR pulls towards denoising representations: the linear probe
measures how well these separate classes. TDCL compares an image with its prompts: `matching_nearest` measures how often
the matching one is nearest. (Margins are not comparable: where all energies are nearly parallel, the margin is small
and may still order the prompts correctly.) The first is best with little noise, the second with more.

The rule is lexicographic and treats statistically equal candidates as ties. This is the one-standard-error rule
(Breiman et al., Classification and Regression Trees, 1984): the simplest model wins among those within
`standard_errors` standard errors of the best.

1. Keep the candidates whose probe is within that distance of the best.
2. Of these, keep those whose share of images with the matching prompt nearest is within that distance of the best.
3. Of these, the fewest layers win, then the fewest dimensions, then the higher accuracy, then the smaller timestep.

The error is that of the best candidate (`probes.py`). Candidates share their images, so the rule treats some
that differ as tied. The probe comes first because training confirmed it (docs/choosing-features.md).
The choices of either criterion alone are reported as well. Without prompts (`margin_images: 0`) step 2 keeps all.

The number of dimensions is not searched: it is the smallest that explains the requested share of a layer's variance.
The best of many candidates is biased upwards by chance, so its accuracy does not estimate the final one; use the test
split for that.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from stages.analyze_features.probes import Scores

_MANY_TIES = 0.1  # share of the candidates


class Share(NamedTuple):
    """A share of images, 0 to 1, and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Candidate:
    """Layers, fused in this order, at a timestep, with the dimensions of each and their scores.

    `margins` are `margins.Similarities.means`, empty without prompts.
    """

    timestep: int
    layers: list[str]
    dims: list[int]
    scores: Scores
    margins: dict[str, float] = field(default_factory=dict)

    @property
    def probe(self) -> Share:
        """Accuracy of the linear probe."""
        return Share(self.scores.probe_accuracy, self.scores.probe_error)

    @property
    def nearest(self) -> Share:
        """Share of images whose matching prompt is nearest; only with prompts."""
        return Share(self.margins["matching_nearest"], self.margins["nearest_error"])

    def row(self) -> dict[str, Any]:
        """Return the candidate as a row of the sweep's table."""
        chosen = {"timestep": self.timestep, "layers": self.layers, "dims": self.dims}
        return chosen | asdict(self.scores) | self.margins

    def in_words(self) -> str:
        """Describe the candidate and its scores."""
        return f"t = {self.timestep}, {' + '.join(self.layers)}: {self.scores_in_words()}"

    def scores_in_words(self) -> str:
        """Describe the scores that the rule uses."""
        accuracy = f"linear probe {100 * self.probe.value:.2f} ± {100 * self.probe.error:.2f} %"
        if not self.margins:
            return accuracy
        return f"{accuracy}, matching prompt nearest {100 * self.nearest.value:.1f} ± {100 * self.nearest.error:.1f} %"


@dataclass(frozen=True)
class Choice:
    """The recommended candidate, the choices by the probe and by the prompts alone, and the numbers of ties."""

    recommended: Candidate
    by_probe: Candidate
    by_prompts: Candidate | None  # None without prompts
    candidates: int
    near_probe: int  # candidates after step 1
    near_both: int  # candidates after step 2, of which the smallest is chosen
    standard_errors: float  # the distance that was allowed

    def rows(self) -> dict[str, Any]:
        """Return the choices as rows of the table, and the numbers of candidates."""
        prompts = self.by_prompts.row() if self.by_prompts else None
        chosen = {"recommended": self.recommended.row(), "by_probe": self.by_probe.row(), "by_prompts": prompts}
        return chosen | {name: getattr(self, name) for name in ("candidates", "near_probe", "near_both")}


def sets_to_fuse(accuracy: Mapping[str, float], backbones_own: Sequence[str]) -> list[list[str]]:
    """Return the fusions to score, fewer than all subsets, given the accuracy of each layer, in the model's order.

    They are the best two layers, the best three, ... all of them (ties to the earlier layer), and those that "auto"
    selects; each in the model's order, none twice.
    """
    ranked = sorted(accuracy, key=lambda layer: -accuracy[layer])
    chosen = [ranked[:count] for count in range(2, len(ranked) + 1)]
    in_order = [[layer for layer in accuracy if layer in fused] for fused in [*chosen, backbones_own]]
    return [fused for place, fused in enumerate(in_order) if len(fused) > 1 and fused not in in_order[:place]]


def choose(candidates: Sequence[Candidate], standard_errors: float) -> Choice:
    """Choose by the rule above, and by the first and the second criterion alone."""
    near_probe = _near_best(candidates, lambda candidate: candidate.probe, standard_errors)
    near_both, by_prompts = near_probe, None
    if all(candidate.margins for candidate in candidates):
        near_both = _near_best(near_probe, lambda candidate: candidate.nearest, standard_errors)
        by_prompts = _smallest(_near_best(candidates, lambda candidate: candidate.nearest, standard_errors))
    recommended, by_probe = _smallest(near_both), _smallest(near_probe)
    numbers = len(candidates), len(near_probe), len(near_both)
    return Choice(recommended, by_probe, by_prompts, *numbers, standard_errors)


def _near_best(
    candidates: Sequence[Candidate], share: Callable[[Candidate], Share], standard_errors: float
) -> list[Candidate]:
    best = max(map(share, candidates))
    least = best.value - standard_errors * best.error - 1e-9
    return [candidate for candidate in candidates if share(candidate).value >= least]


def _smallest(ties: Sequence[Candidate]) -> Candidate:
    return min(ties, key=lambda tie: (len(tie.layers), sum(tie.dims), -tie.probe.value, tie.timestep))


def as_preset(choice: Choice, subject: str, evidence: str, share: float, settings: Mapping[str, Any]) -> str:
    """Write the choice as a preset, YAML whose first line describes it.

    `subject` names data set and model, `evidence` is a sentence on the images that were scored, `share` (0 to 1) is
    that of the variance that the dimensions explain, and `settings` has the other keys that the choice was made with.
    """
    chosen = choice.recommended
    lines = [
        f"By `pipeline sweep-features` for {subject}: {chosen.scores_in_words()}.",
        f"{evidence} ± is one standard error; the best of many candidates is biased upwards.",
        f"Dims explain {100 * share:g} % of a layer's variance.",
        *in_words(choice)[1:],
    ]
    return (
        "".join(f"# {line}\n" for line in lines)
        + "extract_features:\n"
        + f"  timestep: {chosen.timestep}\n"
        + f"  layers: [{', '.join(chosen.layers)}]\n"
        + f"  dims: [{', '.join(map(str, chosen.dims))}]\n"
        + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in settings.items())
    )


def in_words(choice: Choice) -> list[str]:
    """Describe the choice, the candidates tied with it, and the choice of each criterion alone, in lines."""
    lines = [f"recommended: {choice.recommended.in_words()}", *_ties(choice)]
    if choice.by_prompts:
        alone = {"probe": choice.by_probe, "prompts": choice.by_prompts}
        lines += [f"choice by the {name} alone: {candidate.in_words()}" for name, candidate in alone.items()]
    return lines


def hint(choice: Choice, unused: int) -> list[str]:
    """Suggest more images if many candidates are tied and training images are unused."""
    if not unused or choice.near_both <= max(1, _MANY_TIES * choice.candidates):
        return []
    return [
        f"More images would separate these candidates (four times as many halve the standard error); {unused:,} "
        "training images are unused (--images, --margin-images)."
    ]


def _ties(choice: Choice) -> list[str]:
    allowed = f"{choice.standard_errors:g}"
    text = (
        f"{choice.near_probe} of {choice.candidates} candidates are within {allowed} standard "
        f"error{'' if allowed == '1' else 's'} of the best probe"
    )
    if choice.by_prompts:
        text += f", {choice.near_both} of these within {allowed} of the best of them by prompts"
    if choice.near_both == 1:
        return [text]
    return [text, f"{choice.near_both} candidates are tied; chose the fewest layers, then the fewest dimensions."]
