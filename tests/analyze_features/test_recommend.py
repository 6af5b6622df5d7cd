"""The rule of the recommendation on a table made by hand."""

from ruamel.yaml import YAML

from stages.analyze_features.judge import Scores
from stages.analyze_features.recommend import Candidate, as_preset, recommend, sets_to_fuse


def candidate(timestep, dims, accuracy):
    """One with as many layers as `dims`."""
    layers = [f"up_blocks.{number}" for number in range(len(dims))]
    return Candidate(timestep, layers, dims, Scores(accuracy, 0.5, 0.5, 0.5))


BEST = candidate(300, [10, 10, 10], 0.900)
TWO_LAYERS = candidate(200, [20, 20], 0.897)
FEWER_DIMS = candidate(100, [20, 10], 0.896)
WORSE = candidate(50, [5], 0.880)
TABLE = [WORSE, BEST, TWO_LAYERS, FEWER_DIMS]


def test_without_tolerance_the_best_wins():
    assert recommend(TABLE, 0.0) is BEST


def test_ties_go_to_fewer_layers_then_fewer_dims():
    assert recommend(TABLE, 0.003) is TWO_LAYERS
    assert recommend(TABLE, 0.005) is FEWER_DIMS
    assert recommend(TABLE, 0.02) is WORSE


def test_further_ties_go_to_accuracy_then_the_smaller_timestep():
    late, early = candidate(500, [8], 0.9), candidate(100, [8], 0.9)
    better = candidate(700, [8], 0.901)
    assert recommend([late, early], 0.0) is early
    assert recommend([early, better, late], 0.01) is better


def test_fusions_add_the_next_best_layer_and_keep_the_models_order():
    accuracy = {"a": 0.5, "b": 0.9, "c": 0.7, "d": 0.6}
    assert sets_to_fuse(accuracy, ["b", "c", "d"]) == [["b", "c"], ["b", "c", "d"], ["a", "b", "c", "d"]]
    assert sets_to_fuse(accuracy, ["a", "d"])[-1] == ["a", "d"]
    assert sets_to_fuse({"a": 0.5}, ["a"]) == []


def test_the_preset_holds_the_choice():
    text = as_preset(TWO_LAYERS, "digits with tiny-sd, 100 images", 0.95, 0.005)
    assert YAML(typ="safe").load(text) == {
        "extract_features": {"timestep": 200, "layers": ["up_blocks.0", "up_blocks.1"], "dims": [20, 20]}
    }
    assert text.startswith(
        "# Chosen by `pipeline sweep-features` for digits with tiny-sd, 100 images: linear probe 89.70 %"
    )
