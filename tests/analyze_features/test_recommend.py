"""The rule of the recommendation on a table made by hand."""

from ruamel.yaml import YAML

from stages.analyze_features.judge import Scores
from stages.analyze_features.recommend import Candidate, Choice, as_preset, choose, sets_to_fuse


def candidate(timestep, dims, accuracy, nearest=None):
    """One with as many layers as `dims`; `nearest` in percent, where its prompts were looked at."""
    layers = [f"up_blocks.{number}" for number in range(len(dims))]
    margins = {} if nearest is None else {"margin": 0.1, "matching_nearest": nearest / 100}
    return Candidate(timestep, layers, dims, Scores(accuracy, 0.5, 0.5, 0.5), margins)


BEST = candidate(300, [10, 10, 10], 0.900)
TWO_LAYERS = candidate(200, [20, 20], 0.897)
FEWER_DIMS = candidate(100, [20, 10], 0.896)
WORSE = candidate(50, [5], 0.880)
TABLE = [WORSE, BEST, TWO_LAYERS, FEWER_DIMS]


def taken(table, tolerance):
    return choose(table, tolerance).recommended


def test_without_tolerance_the_best_wins():
    assert taken(TABLE, 0.0) is BEST


def test_ties_go_to_fewer_layers_then_fewer_dims():
    assert taken(TABLE, 0.003) is TWO_LAYERS
    assert taken(TABLE, 0.005) is FEWER_DIMS
    assert taken(TABLE, 0.02) is WORSE


def test_further_ties_go_to_accuracy_then_the_smaller_timestep():
    late, early = candidate(500, [8], 0.9), candidate(100, [8], 0.9)
    better = candidate(700, [8], 0.901)
    assert taken([late, early], 0.0) is early
    assert taken([early, better, late], 0.01) is better


def test_prompts_decide_among_ties_of_the_probe_and_size_among_ties_of_both():
    best = candidate(50, [10], 0.900, nearest=40)
    prompts = candidate(100, [10, 10, 10], 0.897, nearest=50)
    smaller = candidate(200, [10, 10], 0.896, nearest=49.7)
    far = candidate(300, [5], 0.700, nearest=60)
    table = [best, prompts, smaller, far]
    assert taken(table, 0.0) is best
    assert taken(table, 0.003) is prompts
    assert taken(table, 0.005) is smaller
    assert taken(table, 0.2) is far


def test_what_one_criterion_alone_would_take_stands_beside_the_choice():
    probe, both, prompts = (
        candidate(50, [10], 0.900, 40), candidate(200, [10, 10], 0.899, 50), candidate(300, [5], 0.7, 60)
    )  # fmt: skip
    assert choose([probe, both, prompts], 0.005) == Choice(both, probe, prompts)
    assert choose(TABLE, 0.005) == Choice(FEWER_DIMS, FEWER_DIMS, None)


def test_fusions_add_the_next_best_layer_and_keep_the_models_order():
    accuracy = {"a": 0.5, "b": 0.9, "c": 0.7, "d": 0.6}
    assert sets_to_fuse(accuracy, ["b", "c", "d"]) == [["b", "c"], ["b", "c", "d"], ["a", "b", "c", "d"]]
    assert sets_to_fuse(accuracy, ["a", "d"])[-1] == ["a", "d"]
    assert sets_to_fuse({"a": 0.5}, ["a"]) == []


PRESET = {"extract_features": {"timestep": 200, "layers": ["up_blocks.0", "up_blocks.1"], "dims": [20, 20]}}


def test_the_preset_holds_the_choice():
    text = as_preset(Choice(TWO_LAYERS, TWO_LAYERS, None), "digits with tiny-sd, 100 images", 0.95, 0.005)
    assert YAML(typ="safe").load(text) == PRESET
    assert text.startswith(
        "# By `pipeline sweep-features` for digits with tiny-sd, 100 images: linear probe 89.70 %.\n"
    )
    assert "prompt" not in text


def test_the_preset_says_what_was_given_up():
    chosen, other = candidate(200, [20, 20], 0.897, nearest=41.5), candidate(300, [28], 0.8, nearest=58.6)
    text = as_preset(Choice(chosen, BEST, other), "digits with tiny-sd, 100 images", 0.95, 0.005)
    assert YAML(typ="safe").load(text) == PRESET
    assert "100 images: linear probe 89.70 %, matching prompt nearest 41.5 %.\n" in text
    assert "by the probe alone: t = 300, up_blocks.0 + up_blocks.1 + up_blocks.2: linear probe 90.00 %\n" in text
    assert "by the prompts alone: t = 300, up_blocks.0: linear probe 80.00 %, matching prompt nearest 58.6 %\n" in text
