"""Numbers in words."""

import pytest

from pipeline.text import duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (150, "2.5 min"),
        (540, "9.0 min"),
        (740, "12 min"),
        (7199, "120 min"),
        (12_600, "3.5 h"),
    ],
)
def test_durations_have_at_least_two_digits_from_two_minutes_on(seconds, words):
    assert duration(seconds) == words
