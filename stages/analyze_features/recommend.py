"""Which timestep, layers and PCA dimensions to take: by accuracy on validation images; the paper fixes them by hand.

The rule: of all candidates of the sweep, those whose linear probe is within `tolerance` of the best are ties; of these
the fewest layers win, then the fewest dimensions, then the higher accuracy, then the smaller timestep. How many
dimensions a layer has is not searched: it is what explains the share of its variance that was asked for. The best of
many is flattered by chance, so its accuracy is no estimate of what it will reach; the test split is there for that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages.analyze_features.judge import Scores


@dataclass(frozen=True)
class Candidate:
    """Layers, fused in this order, at a timestep: the dimensions of each, and how well they do."""

    timestep: int
    layers: list[str]
    dims: list[int]
    scores: Scores

    def row(self) -> dict[str, Any]:
        """The candidate as a row of the sweep's table."""
        return {"timestep": self.timestep, "layers": self.layers, "dims": self.dims, **asdict(self.scores)}


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


def recommend(candidates: Sequence[Candidate], tolerance: float) -> Candidate:
    """The candidate to take, by the rule above."""
    best = max(candidate.scores.probe_accuracy for candidate in candidates)
    ties = [candidate for candidate in candidates if candidate.scores.probe_accuracy >= best - tolerance - 1e-9]
    return min(ties, key=lambda tie: (len(tie.layers), sum(tie.dims), -tie.scores.probe_accuracy, tie.timestep))


def as_preset(chosen: Candidate, of: str, share: float, tolerance: float) -> str:
    """YAML in the presets' format, whose first line says what it is.

    Args:
        chosen: the recommendation.
        of: what it is for: data set, model and number of images.
        share: of the variance that the dimensions explain.
        tolerance: by which it was chosen.
    """
    accuracy = 100 * chosen.scores.probe_accuracy
    return (
        f"# Chosen by `pipeline sweep-features` for {of}: linear probe {accuracy:.2f} % on validation images.\n"
        f"# The fewest layers, then dimensions, within {100 * tolerance:g} points of the best; dims explain "
        f"{100 * share:g} % of a layer's variance.\n"
        "extract_features:\n"
        f"  timestep: {chosen.timestep}\n"
        f"  layers: [{', '.join(chosen.layers)}]\n"
        f"  dims: [{', '.join(map(str, chosen.dims))}]\n"
    )
