"""Figures: their text, and that they remain readable with many layers, classes and unusual names."""

import re

import numpy as np
import pytest

from stages.analyze_features import figures
from stages.analyze_features.sweep import figures as sweep_figures

UNET = [f"up_blocks.{number}" for number in range(4)]
TRANSFORMER = [f"transformer_blocks.{number}" for number in range(28)]
CHANCE = {"probe_accuracy": 0.1, "purity": 0.15, "nmi": 0.02, "ari": 0.0, "matching_nearest": 0.1}


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def legend(svg):
    """Return the legend's entries; matplotlib draws them after all texts except those of the panels."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg[svg.index('id="legend_1"') :])


def height(svg):
    """Return the height in points, 72 per inch."""
    return float(re.search(r'height="([\d.]+)pt"', svg)[1])


def sweep(layers, own, timesteps=(50, 100, 200, 300, 500, 700, 999)):
    """Rows with made-up numbers: each layer alone, the best two, ... all of them, and the backbone's default."""
    rows = []
    for timestep in timesteps:
        rng = np.random.default_rng(timestep)
        ranked = [str(layer) for layer in rng.permutation(layers)]
        fused = [sorted(ranked[:count], key=layers.index) for count in range(2, 1 + len(layers))]
        for names in [[layer] for layer in layers] + fused + [own]:
            shares = dict(zip(CHANCE, rng.random(5) - 0.1, strict=True))
            errors = {"probe_error": 0.02, "nearest_error": 0.03, "margin": 0.01}
            rows.append({"timestep": timestep, "layers": names} | shares | errors)
    return rows


def test_the_legend_of_a_small_sweep_names_all_lines():
    rows = sweep(UNET, UNET[1:])
    (recommended,) = (row for row in rows if row["layers"] == [UNET[2]] and row["timestep"] == 300)
    svg = sweep_figures.curves(rows, recommended, UNET[1:], CHANCE)
    assert legend(svg) == [
        *UNET,
        "all layers: up_blocks.0 to up_blocks.3 (4)",
        "the backbone's own: up_blocks.1 to up_blocks.3 (3)",
        "recommended: up_blocks.2",
        "± one standard error of the recommended",
        "recommended timestep",
        "chance",
    ]
    assert {"linear probe", "k-means ARI", "matching prompt nearest", "margin of the matching prompt"} <= set(
        texts(svg)
    )


def test_a_sweep_of_many_layers_stays_readable():
    rows = sweep(TRANSFORMER, TRANSFORMER[6:20])
    for recommended in (rows[0], rows[29], rows[41]):
        svg = sweep_figures.curves(rows, recommended, TRANSFORMER[6:20], CHANCE)
        entries = legend(svg)
        assert len(entries) <= 6 and max(map(len, entries)) <= 140
        assert height(svg) <= 7 * 72
        assert {TRANSFORMER[0], TRANSFORMER[-1], "thin lines: 28 single layers"} <= set(texts(svg))
        assert sum("transformer_blocks.13" in text for text in texts(svg)) == 0


def test_a_set_with_several_roles_has_one_line():
    rows = sweep(UNET, UNET)
    recommended = next(row for row in rows if row["layers"] == UNET)
    entries = legend(sweep_figures.curves(rows, recommended, UNET, CHANCE))
    assert entries[4] == "all layers, the backbone's own, recommended: up_blocks.0 to up_blocks.3 (4)"
    assert len(entries) == 4 + 1 + 3


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([3], "L3"),
        ([0, 1], "L0 + L1"),
        ([0, 2, 3, 4, 5, 9], "L0 + L2 to L5 (4) + L9"),
        ([0, 2, 4, 6, 8, 9], "L0 + L2 + ... + L9 (6 layers)"),
    ],
)
def test_a_set_of_layers_in_words(numbers, words):
    order = [f"L{number}" for number in range(10)]
    assert sweep_figures.in_words([order[number] for number in numbers], order) == words


def test_without_prompts_there_are_four_panels():
    margins = ("matching_nearest", "nearest_error", "margin")
    rows = [{key: row[key] for key in row if key not in margins} for row in sweep(UNET, UNET[1:])]
    svg = sweep_figures.curves(rows, rows[0], UNET[1:], CHANCE)
    assert not [text for text in texts(svg) if "matching" in text] and "k-means NMI" in texts(svg)


def scores(**changes):
    return {"probe_accuracy": 0.9, "purity": 0.5, "nmi": 0.4, "ari": 0.3} | changes


def test_bars_show_a_negative_ari():
    svg = figures.bars({"_odd": scores(ari=-0.2), "other": scores()}, CHANCE)
    assert "−0.2" in texts(svg)  # a tick of the axis, with matplotlib's minus
    assert legend(svg) == ["_odd", "other", "chance"]
    assert "-0.20" in texts(svg)
    assert "−0.2" not in texts(figures.bars({"other": scores()}, CHANCE))


def test_odd_class_names_appear_in_the_tsne_legend_and_a_row_has_three_panels():
    names = ["_hidden", "$\\frac$", "x" * 90]
    planes = {f"layer {number}": np.random.default_rng(number).normal(size=(6, 2)) for number in range(5)}
    svg = figures.scatter(planes, np.array([0, 1, 2, 0, 1, 2]), names)
    assert legend(svg) == ["_hidden", "$\\frac$", "x" * 37 + "..."]
    width = float(re.search(r'width="([\d.]+)pt"', svg)[1])
    assert width < 2 * height(svg)
    assert [text for text in texts(svg) if text.startswith("layer")] == list(planes)


def test_pairs_that_were_never_compared_are_not_shown_as_never_nearest():
    prompts, margins = ["a photo of a cat", "a photo of a car"], [np.array([0.1, 0.2]), np.array([])]
    complete, part = np.array([[0.5, 0.5], [0.0, 1.0]]), np.array([[1.0, np.nan], [0.0, 1.0]])
    drawn = figures.confusion(part, prompts, margins, ["_cat", "car"])
    assert "never compared" in texts(drawn) and "_cat" in texts(drawn)
    assert "never compared" not in texts(figures.confusion(complete, prompts, margins, ["_cat", "car"]))
    assert "nearest prompt: a photo of a ..." in texts(drawn) and {"cat", "car"} <= set(texts(drawn))


@pytest.mark.parametrize(
    ("prompts", "shared", "names"),
    [
        (["a photo of a cat", "a photo of a car"], "a photo of a ...", ["cat", "car"]),
        (["a red cat, small", "a red sea lion, small"], "a red ... small", ["cat,", "sea lion,"]),
        (["cat", "a cat"], "...", ["cat", "a cat"]),
        (["a cat", "a cat"], "a ...", ["cat", "cat"]),
        (["one"], "...", ["one"]),
    ],
)
def test_prompts_are_cut_between_words(prompts, shared, names):
    assert figures.differing(prompts) == (shared, names)


def test_signs_match_the_preceding_timestep():
    """The first channel has the opposite sign, the second the same sign, and the third is missing."""
    first = np.array([[[[0, 10, 0], [200, 90, 0]]]], np.uint8)  # (1, 1, 2, 3)
    second = np.array([[[[250, 20, 0], [5, 40, 0]]]], np.uint8)
    third = np.array([[[[240, 9, 0], [2, 3, 0]]]], np.uint8)
    matched = sweep_figures.with_signs_matched([first, second, third])
    assert matched[0].tolist() == first.tolist()
    assert matched[1].tolist() == [[[[5, 20, 0], [250, 40, 0]]]]
    assert matched[2].tolist() == [[[[15, 246, 0], [253, 252, 0]]]]
    assert matched[2].dtype == np.uint8


def test_maps_of_many_layers_have_a_bounded_height():
    rgb = {timestep: {layer: np.zeros((4, 4, 3), np.uint8) for layer in TRANSFORMER} for timestep in (50, 300)}
    png = sweep_figures.maps(np.zeros((8, 8, 3), np.uint8), rgb)
    assert int.from_bytes(png[20:24], "big") <= 1700  # IHDR's height
