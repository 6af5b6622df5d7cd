"""The Dirichlet partition."""

import numpy as np
import pytest

from pipeline.errors import PipelineError
from stages.train_fl.partition import dirichlet, label_counts

LABELS = np.repeat(np.arange(10), 100)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 100.0])
def test_every_sample_goes_to_one_client(alpha):
    parts = dirichlet(LABELS, 10, alpha, 10, np.random.default_rng(0))
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    assert min(map(len, parts)) >= 10


def test_a_small_alpha_is_more_heterogeneous():
    def classes_present(alpha):
        parts = dirichlet(LABELS, 10, alpha, 10, np.random.default_rng(1))
        return (label_counts(parts, LABELS, 10) > 0).sum(1).mean()

    assert classes_present(0.05) < classes_present(0.5) < classes_present(100.0) == 10


def test_impossible_minimum_is_named():
    with pytest.raises(PipelineError, match="cannot give each of 10 clients 101"):
        dirichlet(LABELS, 10, 1.0, 101, np.random.default_rng(0))
