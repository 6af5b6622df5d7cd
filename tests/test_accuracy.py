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


def test_gain_is_paired_and_has_an_interval_by_students_t():
    gain = accuracy.gain([0.5, 0.6, 0.7], [0.4, 0.4, 0.4])  # 0.1, 0.2, 0.3: deviation 0.1
    assert gain.by_seed == pytest.approx([0.1, 0.2, 0.3])
    assert gain.half_width == pytest.approx(4.302653 * 0.1 / 3**0.5)  # t of 2 degrees of freedom, from a table
    assert (str(gain), gain.sign) == ("+20.00 ± 24.84", 0)


@pytest.mark.parametrize(
    ("own", "text", "sign"),
    [
        # differences 0.01, 0.02, 0.03: 2 points, deviation 1, half-width 4.302653 / sqrt(3) = 2.48
        ([0.21, 0.32, 0.43], "+2.00 ± 2.48", 0),
        # 0.02, 0.03, 0.04
        ([0.22, 0.33, 0.44], "+3.00 ± 2.48*", 1),
        ([0.18, 0.27, 0.36], "\u22123.00 ± 2.48*", -1),
        ([0.2, 0.3, 0.4], "+0.00 ± 0.00", 0),
    ],
)
def test_asterisk_marks_an_interval_that_excludes_zero(own, text, sign):
    gain = accuracy.gain(own, [0.2, 0.3, 0.4])
    assert (str(gain), gain.sign) == (text, sign)


def test_equal_accuracies_are_a_tie_in_spite_of_rounding():
    gain = accuracy.gain([0.1 + 0.2, 0.5], [0.3, 0.5])  # 0.1 + 0.2 is above 0.3
    assert gain.by_seed == [0, 0]


def test_gain_of_one_seed_has_no_interval():
    gain = accuracy.gain([0.5], [0.4])
    assert (str(gain), gain.half_width, gain.sign) == ("+10.00", None, 0)
    assert accuracy.gain_in_words([0]) == "of the one seed"
