"""Accuracy as one number, and its description."""

import pytest

from pipeline import accuracy


def test_accuracy_of_a_run_averages_the_last_five_rounds_or_all_if_fewer():
    assert accuracy.of_run([0.0, 0.1, 0.2, 0.3, 0.4, 1.0]) == pytest.approx(0.4)  # (0.1 + 0.2 + 0.3 + 0.4 + 1) / 5
    assert accuracy.of_run([0.2, 0.4]) == pytest.approx(0.3)
    words = [accuracy.rounds_in_words(number) for number in (25, 5, 4, 1)]
    assert words == ["mean of the last five rounds"] * 2 + ["mean of all 4 rounds", "after the only round"]


def test_deviation_needs_two_seeds():
    assert accuracy.in_percent([0.5, 0.7]) == "60.00 ± 14.14"  # sqrt((0.1^2 + 0.1^2) / (2 - 1))
    assert accuracy.in_percent([0.5]) == "50.00" and accuracy.deviation([0.5]) is None
    assert accuracy.seeds_in_words([3]) == "one run, seed 3 (n = 1)"
    assert accuracy.seeds_in_words([0, 2]) == "mean ± standard deviation over seeds 0, 2 (n = 2)"
