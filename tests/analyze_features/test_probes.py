"""Probe and clusters, compared with numbers derived by hand."""

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.settings.params import AnalyzeFeatures
from stages.analyze_features.probes import ProbeEvaluator, chance, purity, standard_error
from tests.extract_features.fixtures import section


def settings(**changes):
    return section(AnalyzeFeatures, "analyze_features", **changes)


def test_purity_by_hand():
    clusters = np.array([0, 0, 0, 1, 1, 1, 1, 2])
    labels = np.array([0, 0, 1, 1, 1, 2, 0, 2])
    assert purity(clusters, labels) == (2 + 2 + 1) / 8  # majorities: two 0s, two 1s, one 2


def test_separated_classes_score_one_throughout():
    labels = np.repeat([0, 1, 2], 8)
    features = np.stack([np.where(labels == 1, 10.0, 0.0), np.where(labels == 2, 10.0, 0.0)], axis=1)
    scores = ProbeEvaluator(labels, settings()).scores(features)
    assert vars(scores) == {"probe_accuracy": 1, "probe_error": 0, "purity": 1, "nmi": 1, "ari": 1}


def test_clusters_across_the_classes_by_hand():
    """Two tight groups of three; the first holds two of class 0 and one of 1, the second one of 0 and two of 1."""
    features = np.array([[0.0], [0.01], [0.02], [9.0], [9.01], [9.02]] * 5)
    labels = np.array([0, 0, 1, 0, 1, 1] * 5)
    scores = ProbeEvaluator(labels, settings(validation_fraction=0.4)).scores(features)
    # contingency of 30 points: [[10, 5], [5, 10]]; NMI = I / log 2, both entropies being log 2
    information = 2 / 3 * np.log(2 / 3 / 0.5) + 1 / 3 * np.log(1 / 3 / 0.5)
    # pairs: in cells 2 * 45 + 2 * 10 = 110, in rows and in columns 2 * 105 = 210 each, of 435
    expected_ari = (110 - 210 * 210 / 435) / (210 - 210 * 210 / 435)
    assert scores.purity == pytest.approx(2 / 3, abs=1e-6)
    assert scores.nmi == pytest.approx(information / np.log(2), abs=1e-6)
    assert scores.ari == pytest.approx(expected_ari, abs=1e-6)


def test_the_probe_is_scored_on_images_that_it_was_not_fitted_on():
    """With random labels, a probe fitted and scored on the same 40 images with 60 dimensions would reach 100 %."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    accuracy = ProbeEvaluator(labels, settings(splits=10)).scores(rng.normal(size=(40, 60))).probe_accuracy
    assert 0.3 < accuracy < 0.7


def test_the_standard_error_of_a_share_by_hand():
    assert standard_error(0.8, 100) == pytest.approx(0.04)
    assert standard_error(1.0, 100) == standard_error(0.0, 7) == 0


def test_the_probes_error_is_based_on_the_effective_number_of_images():
    """Ten splits hold out 10 of 40 images each. Repeated images count less than new ones."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    evaluator = ProbeEvaluator(labels, settings(splits=10))
    assert 30 < evaluator.held_out <= 40
    assert 10 < evaluator.effective_images < evaluator.held_out
    assert (
        ProbeEvaluator(labels, settings(splits=1)).held_out
        == ProbeEvaluator(labels, settings(splits=1)).effective_images
        == 10
    )
    scores = evaluator.scores(rng.normal(size=(40, 3)))
    share = scores.probe_accuracy
    assert scores.probe_error == pytest.approx((share * (1 - share) / evaluator.effective_images) ** 0.5, abs=1e-6)


def test_chance():
    """Two clusters, two classes of two images each: pure with probability 1 / 3, otherwise mixed evenly."""
    few = chance(np.array([0, 1, 0, 1]), 4, 0)
    assert few["probe_accuracy"] == 0.5 and few["matching_nearest"] == 0.25 and few["ari"] == 0
    assert 0.5 < few["purity"] < 0.9 and few["nmi"] == pytest.approx(2 * few["purity"] - 1, abs=1e-5)
    many = chance(np.repeat(np.arange(10), [910] + [10] * 9), 2, 0)
    assert many["purity"] == many["probe_accuracy"] == 0.91  # every cluster's majority is the frequent class
    assert 0 < many["nmi"] < 0.05


def test_scores_do_not_depend_on_the_scale_of_a_dimension():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = rng.normal(size=(60, 4)) + labels[:, None]
    evaluator = ProbeEvaluator(labels, settings())
    assert evaluator.scores(features) == evaluator.scores(features * [1, 1e4, 1e-4, 7] + 3)


def test_too_few_images_are_rejected():
    with pytest.raises(PipelineError, match="2 images of 2 classes are too few"):
        ProbeEvaluator(np.array([0, 1]), settings(validation_fraction=0.5))
