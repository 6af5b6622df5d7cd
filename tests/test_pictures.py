"""Figures: equal bytes, the reader's colours, literal text, and ids that are unique within a page."""

import re

import matplotlib
from matplotlib.figure import Figure

from pipeline import plotting


@plotting.svg
def bars(name):
    figure = Figure()
    axes = figure.add_subplot(title=name)
    axes.bar([name, "b"], [1, 2], label=name)
    axes.legend()
    return figure


def test_equal_figures_give_equal_bytes_without_a_date():
    assert bars("a") == bars("a") != bars("c")
    assert "<dc:date>" not in bars("a")


def test_text_has_the_readers_colour_and_is_not_parsed_as_a_formula():
    drawn = bars("$x_2$")
    assert drawn.count(">$x_2$</text>") == 3  # title, axis, legend
    assert "fill: #000000" not in drawn and "currentColor" in drawn and plotting.INK not in drawn
    assert re.search("<svg [^>]*><style>:root { color: #1d2330; background: #fff } @media", drawn)


def test_inlined_figures_share_no_ids_and_refer_to_their_own():
    one, other = (plotting.inline(bars("a"), number) for number in (1, 2))
    ids = [set(re.findall(r' id="([^"]*)"', text)) for text in (one, other)]
    assert ids[0] and not ids[0] & ids[1]
    for text, own in zip((one, other), ids, strict=True):
        assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text))
        assert {a or b for a, b in re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)} <= own
        assert text.startswith("<svg") and "<style>:root" not in text


def test_inlining_changes_no_text_and_ignores_the_users_style(recwarn):
    name = ' id="x url(#a) #010203 \u4e2d\u6587'
    drawn = plotting.inline(bars(name), 7)
    assert drawn.count(">" + name.replace("&", "&amp;") + "</text>") == 3
    with matplotlib.rc_context({"font.size": 30}):
        assert plotting.inline(bars(name), 7) == drawn
    assert not recwarn.list


@plotting.png
def photo(name):
    figure = Figure(figsize=(1, 1), layout="constrained")
    axes = figure.subplots(3, 3)
    for each in axes.flat:
        each.set(title=name * 20, ylabel=name)
    return figure


def test_drawing_emits_no_warnings(recwarn):
    assert photo("\u4e2d\U0001f69a").startswith(b"\x89PNG")  # missing glyphs, crowded axes
    assert bars("\u4e2d\U0001f69a")
    assert not recwarn.list
