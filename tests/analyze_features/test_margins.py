"""Margins of matching prompts in two dimensions, computed by hand."""

import numpy as np
import pytest

from stages.analyze_features import margins

# cosines to the first axis: 1, 0.6, 0; lengths differ, and must not matter
AXIS, SLANTED, UPRIGHT = [1.0, 0.0], [3.0, 4.0], [0.0, 2.0]


@pytest.fixture
def similar():
    """Two images along the first axis: the matching prompt is nearest for the first, but not for the second."""
    denoised = np.array([AXIS, AXIS], np.float16)
    prompted = np.array([[SLANTED, AXIS, UPRIGHT], [AXIS, UPRIGHT, SLANTED]], np.float16)
    return margins.similarities(denoised, prompted, np.array([1, 2]))


def test_margins_of_one_image(similar):
    first, second = np.array([True, False]), np.array([False, True])
    assert similar.means(first) == {
        "margin": 0.7,  # 1 - (0.6 + 0) / 2
        "hardest_margin": 0.4,  # 1 - 0.6
        "matching_nearest": 1.0,
        "nearest_error": 0.0,
        "separation": 0.7,  # 1 - (0.6 + 0) / 2: the matching one lies on the axis
    }
    assert similar.means(second) == {
        "margin": 0.1,  # 0.6 - (1 + 0) / 2
        "hardest_margin": -0.4,  # 0.6 - 1
        "matching_nearest": 0.0,
        "nearest_error": 0.0,
        "separation": 0.3,  # of (0.6, 0.8): 1 - (0.6 + 0.8) / 2
    }


def test_means_are_over_images(similar):
    both = similar.means(np.array([True, True]))
    assert both == {
        "margin": 0.4,
        "hardest_margin": 0.0,
        "matching_nearest": 0.5,
        "nearest_error": 0.353553,  # sqrt(0.5 * 0.5 / 2)
        "separation": 0.5,
    }
    np.testing.assert_allclose(similar.margins(), [0.7, 0.1])


def test_nearest_prompts_and_their_confusion(similar):
    assert similar.nearest().tolist() == [1, 0]
    prompt_class = np.array([[0, 1], [1, 0], [0, 1], [2, 1]])
    share = margins.confusion(np.array([1, 1, 1, 0]), prompt_class, np.array([0, 0, 0, 2]), 3, 3)
    never = np.nan
    np.testing.assert_allclose(share, [[1 / 3, 2 / 3, never], [never] * 3, [never, 0, 1]])
