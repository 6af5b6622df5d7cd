"""The recommendation rule and its description, on a hand-made table."""

from ruamel.yaml import YAML

from stages.analyze_features.probes import Scores
from stages.analyze_features.sweep.recommend import Candidate, Choice, as_preset, choose, hint, in_words, sets_to_fuse


def candidate(timestep, dims, accuracy, nearest=None, error=0.01):
    """A candidate with as many layers as `dims`; `nearest` in percent with its `error`, if it has prompts."""
    layers = [f"up_blocks.{number}" for number in range(len(dims))]
    margins = {} if nearest is None else {"margin": 0.1, "matching_nearest": nearest / 100, "nearest_error": error}
    return Candidate(timestep, layers, dims, Scores(accuracy, error, 0.5, 0.5, 0.5), margins)


BEST = candidate(300, [10, 10, 10], 0.900)
TWO_LAYERS = candidate(200, [20, 20], 0.897)
FEWER_DIMS = candidate(100, [20, 10], 0.896)
WORSE = candidate(50, [5], 0.880)
TABLE = [WORSE, BEST, TWO_LAYERS, FEWER_DIMS]


def taken(table, standard_errors):
    return choose(table, standard_errors).recommended


def test_with_zero_standard_errors_the_best_wins():
    assert taken(TABLE, 0.0) is BEST


def test_ties_go_to_fewer_layers_then_fewer_dims():
    assert taken(TABLE, 0.3) is TWO_LAYERS
    assert taken(TABLE, 0.5) is FEWER_DIMS
    assert taken(TABLE, 2.0) is WORSE


def test_the_error_that_decides_is_the_best_candidates():
    worse = candidate(50, [5], 0.880, error=0.5)
    assert taken([BEST, worse], 1.0) is BEST
    few = candidate(50, [5], 0.885, nearest=49, error=0.001)
    sure, unsure = (candidate(300, [10, 10, 10], 0.890, nearest=50, error=error) for error in (0.004, 0.02))
    assert taken([sure, few], 1.0) is sure
    assert taken([unsure, few], 1.0) is few


def test_further_ties_go_to_accuracy_then_the_smaller_timestep():
    late, early = candidate(500, [8], 0.9), candidate(100, [8], 0.9)
    better = candidate(700, [8], 0.901)
    assert taken([late, early], 0.0) is early
    assert taken([early, better, late], 1.0) is better


def test_prompts_decide_among_ties_of_the_probe_and_size_among_ties_of_both():
    best = candidate(50, [10], 0.900, nearest=40)
    prompts = candidate(100, [10, 10, 10], 0.897, nearest=50)
    smaller = candidate(200, [10, 10], 0.896, nearest=49.7)
    far = candidate(300, [5], 0.700, nearest=60)
    table = [best, prompts, smaller, far]
    assert taken(table, 0.0) is best
    assert taken(table, 0.3) is prompts
    assert taken(table, 0.5) is smaller
    assert taken(table, 20.0) is far


def test_the_choice_of_each_criterion_alone_is_reported():
    probe, both, prompts = (
        candidate(50, [10], 0.900, 40), candidate(200, [10, 10], 0.899, 50), candidate(300, [5], 0.7, 60)
    )  # fmt: skip
    assert choose([probe, both, prompts], 0.5) == Choice(both, probe, prompts, 3, 2, 1, 0.5)
    assert choose(TABLE, 0.5) == Choice(FEWER_DIMS, FEWER_DIMS, None, 4, 3, 3, 0.5)


def test_description_counts_tied_candidates():
    assert in_words(choose(TABLE, 0.5)) == [
        "recommended: t = 100, up_blocks.0 + up_blocks.1: linear probe 89.60 ± 1.00 %",
        "3 of 4 candidates are within 0.5 standard errors of the best probe",
        "3 candidates are tied; chose the fewest layers, then the fewest dimensions.",
    ]
    table = [candidate(50, [10], 0.9, 40), candidate(200, [10, 10], 0.899, 50), candidate(300, [5], 0.7, 60)]
    assert in_words(choose(table, 1.0))[1:3] == [
        "2 of 3 candidates are within 1 standard error of the best probe, 1 of these within 1 of the best of them by "
        "prompts",
        f"choice by the probe alone: {table[0].in_words()}",
    ]
    assert in_words(choose([BEST], 1.0))[1:] == ["1 of 1 candidates are within 1 standard error of the best probe"]


def test_more_images_are_suggested_if_many_candidates_are_tied_and_images_are_unused():
    many, few = choose(TABLE, 0.5), choose([BEST] + [WORSE] * 19, 0.5)
    (line,) = hint(many, 1234)
    assert "1,234 training images are unused" in line
    assert hint(many, 0) == hint(few, 1234) == []


def test_fusions_add_the_next_best_layer_and_keep_the_models_order():
    accuracy = {"a": 0.5, "b": 0.9, "c": 0.7, "d": 0.6}
    assert sets_to_fuse(accuracy, ["b", "c", "d"]) == [["b", "c"], ["b", "c", "d"], ["a", "b", "c", "d"]]
    assert sets_to_fuse(accuracy, ["a", "d"])[-1] == ["a", "d"]
    assert sets_to_fuse({"a": 0.5}, ["a"]) == []


PRESET = {"extract_features": {"timestep": 200, "layers": ["up_blocks.0", "up_blocks.1"], "dims": [20, 20]}}


def test_the_preset_holds_the_choice_and_describes_its_basis():
    text = as_preset(choose([TWO_LAYERS, BEST], 0.3), "digits with tiny-sd", "80 of 100 images were scored.", 0.95, {})
    assert YAML(typ="safe").load(text) == PRESET
    assert text.splitlines()[:5] == [
        "# By `pipeline sweep-features` for digits with tiny-sd: linear probe 89.70 ± 1.00 %.",
        "# 80 of 100 images were scored. ± is one standard error; the best of many candidates is biased upwards.",
        "# Dims explain 95 % of a layer's variance.",
        "# 2 of 2 candidates are within 0.3 standard errors of the best probe",
        "# 2 candidates are tied; chose the fewest layers, then the fewest dimensions.",
    ]
    assert "prompt" not in text


def test_the_preset_names_the_choices_of_each_criterion():
    chosen, other = candidate(200, [20, 20], 0.897, nearest=41.5), candidate(300, [28], 0.8, nearest=58.6)
    best = candidate(300, [10, 10, 10], 0.900, nearest=40)
    text = as_preset(choose([chosen, best, other], 0.3), "digits with tiny-sd", "100 images", 0.95, {"image_size": 64})
    assert YAML(typ="safe").load(text) == {"extract_features": PRESET["extract_features"] | {"image_size": 64}}
    assert ": linear probe 89.70 ± 1.00 %, matching prompt nearest 41.5 ± 1.0 %.\n" in text
    assert "by the probe alone: t = 200, up_blocks.0 + up_blocks.1: linear probe 89.70 ± 1.00 %" in text
    assert "by the prompts alone: t = 300, up_blocks.0: linear probe 80.00 ± 1.00 %, matching prompt nearest 58" in text
