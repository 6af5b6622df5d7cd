"""Which timestep, layers and PCA dimensions to take: by validation images and prompts; the paper fixes them by hand.

FedDifRC has two targets, and they want different things. NDCR pulls towards denoising representations: the linear
probe says how well these tell classes apart. TDCL compares an image with its prompts: `matching_nearest` says how often
the matching one is nearest. (The margin itself does not compare: where all energies are nearly parallel it is small
and may still order the prompts rightly.) With little noise the first is best, with more the second.

The rule is lexicographic, and `tolerance` is its only weight:

1. of all candidates, those whose probe is within `tolerance` of the best are kept;
2. of these, those whose share of images with the matching prompt nearest is within `tolerance` of the best;
3. of these the fewest layers win, then the fewest dimensions, then the higher accuracy, then the smaller timestep.

So `tolerance` is the accuracy that one gives up for better prompts, and then for fewer numbers. The probe comes first
because training bore it out: on digits' validation split FedDifRC reached 80.2 % with this rule's choice (mean of two
partitions, three seeds), 79.7 with the probe's, 79.2 with that of the mean of both, 77.8 with the prompts' (differences
within a deviation over seeds but the last at Dirichlet 0.05; docs/choosing-features.md). What either criterion alone
would take stands beside the choice. Without prompts (`margin_images: 0`) step 2 keeps all.

How many dimensions a layer has is not searched: it is what explains the share of its variance that was asked for. The
best of many is flattered by chance, so its accuracy is no estimate of what it will reach; the test split is there for
that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stages.analyze_features.judge import Scores


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

    def row(self) -> dict[str, Any]:
        """The candidate as a row of the sweep's table."""
        chosen = {"timestep": self.timestep, "layers": self.layers, "dims": self.dims}
        return chosen | asdict(self.scores) | self.margins

    def in_words(self) -> str:
        """What it is and how it does."""
        return f"t = {self.timestep}, {' + '.join(self.layers)}: {self.scores_in_words()}"

    def scores_in_words(self) -> str:
        """How it does, by what the rule reads."""
        accuracy = f"linear probe {100 * _accuracy(self):.2f} %"
        return accuracy + (f", matching prompt nearest {100 * _nearest(self):.1f} %" if self.margins else "")


@dataclass(frozen=True)
class Choice:
    """The candidate to take, and those that one criterion alone would take; by prompts None without them."""

    recommended: Candidate
    by_probe: Candidate
    by_prompts: Candidate | None

    def rows(self) -> dict[str, Any]:
        """Each as a row of the table."""
        prompts = self.by_prompts.row() if self.by_prompts else None
        return {"recommended": self.recommended.row(), "by_probe": self.by_probe.row(), "by_prompts": prompts}


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


def choose(candidates: Sequence[Candidate], tolerance: float) -> Choice:
    """Chooses by the rule above, and by the first and the second criterion alone."""
    by_probe = _smallest(_near_best(candidates, _accuracy, tolerance))
    if not all(candidate.margins for candidate in candidates):
        return Choice(by_probe, by_probe, None)
    by_both = _near_best(_near_best(candidates, _accuracy, tolerance), _nearest, tolerance)
    return Choice(_smallest(by_both), by_probe, _smallest(_near_best(candidates, _nearest, tolerance)))


def as_preset(choice: Choice, of: str, share: float, tolerance: float) -> str:
    """YAML in the presets' format, whose first line says what it is.

    Args:
        choice: what to take.
        of: what it is for: data set, model and number of images.
        share: of the variance that the dimensions explain.
        tolerance: by which it was chosen.
    """
    taken = choice.recommended
    criteria = "probe, then by prompts" if choice.by_prompts else "probe"
    lines = [
        f"By `pipeline sweep-features` for {of}: {taken.scores_in_words()}.",
        f"By the {criteria}, within {100 * tolerance:g} points of the best, then the fewest layers and dims, which",
        f"explain {100 * share:g} % of a layer's variance. On validation images; the best of many is flattered.",
        *in_words(choice)[1:],
    ]
    return (
        "".join(f"# {line}\n" for line in lines)
        + "extract_features:\n"
        + f"  timestep: {taken.timestep}\n"
        + f"  layers: [{', '.join(taken.layers)}]\n"
        + f"  dims: [{', '.join(map(str, taken.dims))}]\n"
    )


def in_words(choice: Choice) -> list[str]:
    """The choice, and what one criterion alone would take, a line each."""
    lines = [f"recommended: {choice.recommended.in_words()}"]
    if choice.by_prompts:
        lines += [f"by the probe alone: {choice.by_probe.in_words()}"]
        lines += [f"by the prompts alone: {choice.by_prompts.in_words()}"]
    return lines


def _near_best(
    candidates: Sequence[Candidate], score: Callable[[Candidate], float], tolerance: float
) -> list[Candidate]:
    best = max(map(score, candidates))
    return [candidate for candidate in candidates if score(candidate) >= best - tolerance - 1e-9]


def _smallest(ties: Sequence[Candidate]) -> Candidate:
    return min(ties, key=lambda tie: (len(tie.layers), sum(tie.dims), -_accuracy(tie), tie.timestep))


def _accuracy(candidate: Candidate) -> float:
    return candidate.scores.probe_accuracy


def _nearest(candidate: Candidate) -> float:
    return candidate.margins["matching_nearest"]
