"""Which timestep, layers and PCA dimensions to take: by validation images and prompts; the paper fixes them by hand.

FedDifRC has two targets, and they want different things. NDCR pulls towards denoising representations: the linear
probe says how well these tell classes apart. TDCL compares an image with its prompts: `matching_nearest` says how often
the matching one is nearest. (The margin itself does not compare: where all energies are nearly parallel it is small
and may still order the prompts rightly.) With little noise the first is best, with more the second.

The rule is lexicographic, and what cannot be told apart is a tie: the one-standard-error rule (Breiman et al.,
Classification and Regression Trees, 1984), by which the simplest model wins of all that are within one standard error
of the best. `standard_errors` is how many:

1. of all candidates, those whose probe is within that many of the best one's are kept;
2. of these, those whose share of images with the matching prompt nearest is within that many of the best one's among
   them;
3. of these the fewest layers win, then the fewest dimensions, then the higher accuracy, then the smaller timestep.

The error is the best candidate's own, of as many distinct images as it was judged on (`judge.py`); candidates share
their images, so that it rather takes two for equal that are not than the other way round. The probe comes first because
training bore it out (docs/choosing-features.md). What either criterion alone would take stands beside the choice.
Without prompts (`margin_images: 0`) step 2 keeps all.

How many dimensions a layer has is not searched: it is what explains the share of its variance that was asked for. The
best of many is flattered by chance, so its accuracy is no estimate of what it will reach; the test split is there for
that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from stages.analyze_features.probes import Scores


class Share(NamedTuple):
    """A share of images, 0 to 1, and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Candidate:
    """Layers, fused in this order, at a timestep: the dimensions of each, and how well they do.

    `margins` are `margins.Similarities.means`, empty where prompts were not looked at.
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
        """How often the matching prompt is nearest; only where prompts were looked at."""
        return Share(self.margins["matching_nearest"], self.margins["nearest_error"])

    def row(self) -> dict[str, Any]:
        """The candidate as a row of the sweep's table."""
        chosen = {"timestep": self.timestep, "layers": self.layers, "dims": self.dims}
        return chosen | asdict(self.scores) | self.margins

    def in_words(self) -> str:
        """What it is and how it does."""
        return f"t = {self.timestep}, {' + '.join(self.layers)}: {self.scores_in_words()}"

    def scores_in_words(self) -> str:
        """How it does, by what the rule reads."""
        accuracy = f"linear probe {100 * self.probe.value:.2f} ± {100 * self.probe.error:.2f} %"
        if not self.margins:
            return accuracy
        return f"{accuracy}, matching prompt nearest {100 * self.nearest.value:.1f} ± {100 * self.nearest.error:.1f} %"


@dataclass(frozen=True)
class Choice:
    """What to take, and how well that is told from the rest.

    Attributes:
        recommended: the candidate to take.
        by_probe: the one that the probe alone would take.
        by_prompts: the one that the prompts alone would take, None without them.
        candidates: how many there were.
        near_probe: how many are left after step 1.
        near_both: how many are left after step 2: the choice is one of these, by its size.
        standard_errors: that were allowed.
    """

    recommended: Candidate
    by_probe: Candidate
    by_prompts: Candidate | None
    candidates: int
    near_probe: int
    near_both: int
    standard_errors: float

    def rows(self) -> dict[str, Any]:
        """Each candidate as a row of the table, and the numbers."""
        prompts = self.by_prompts.row() if self.by_prompts else None
        chosen = {"recommended": self.recommended.row(), "by_probe": self.by_probe.row(), "by_prompts": prompts}
        return chosen | {name: getattr(self, name) for name in ("candidates", "near_probe", "near_both")}


def sets_to_fuse(accuracy: Mapping[str, float], backbones_own: Sequence[str]) -> list[list[str]]:
    """Which fusions to judge, given each layer's accuracy alone: linear in the layers, where all subsets were not.

    Args:
        accuracy: layer -> accuracy of its probe, in the model's order.
        backbones_own: the layers that "auto" stands for.

    Returns:
        The best two layers, the best three, ... all of them (ties to the earlier layer), and the backbone's own; each
        in the model's order, none twice.
    """
    ranked = sorted(accuracy, key=lambda layer: -accuracy[layer])
    chosen = [ranked[:count] for count in range(2, len(ranked) + 1)]
    in_order = [[layer for layer in accuracy if layer in fused] for fused in [*chosen, backbones_own]]
    return [fused for place, fused in enumerate(in_order) if len(fused) > 1 and fused not in in_order[:place]]


def choose(candidates: Sequence[Candidate], standard_errors: float) -> Choice:
    """Chooses by the rule above, and by the first and the second criterion alone."""
    near_probe = _near_best(candidates, lambda candidate: candidate.probe, standard_errors)
    near_both, by_prompts = near_probe, None
    if all(candidate.margins for candidate in candidates):
        near_both = _near_best(near_probe, lambda candidate: candidate.nearest, standard_errors)
        by_prompts = _smallest(_near_best(candidates, lambda candidate: candidate.nearest, standard_errors))
    return Choice(
        recommended=_smallest(near_both),
        by_probe=_smallest(near_probe),
        by_prompts=by_prompts,
        candidates=len(candidates),
        near_probe=len(near_probe),
        near_both=len(near_both),
        standard_errors=standard_errors,
    )


def _near_best(
    candidates: Sequence[Candidate], share: Callable[[Candidate], Share], standard_errors: float
) -> list[Candidate]:
    best = max(map(share, candidates))
    least = best.value - standard_errors * best.error - 1e-9
    return [candidate for candidate in candidates if share(candidate).value >= least]


def _smallest(ties: Sequence[Candidate]) -> Candidate:
    return min(ties, key=lambda tie: (len(tie.layers), sum(tie.dims), -tie.probe.value, tie.timestep))
