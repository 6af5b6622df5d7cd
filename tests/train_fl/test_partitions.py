"""Partitions and their statistics: coverage, hand-made counts, published numbers."""

import math

import numpy as np
import pytest

from pipeline.errors import PipelineError
from stages.train_fl.partitions import (
    by_domain,
    classes_per_client,
    dirichlet,
    dirichlet_balanced,
    even_clients_per_domain,
    heterogeneity,
    iid,
    label_counts,
    label_skew,
    long_tail,
    picture,
)

LABELS = np.repeat(np.arange(10), 100)
CIFAR = np.repeat(np.arange(10), 5000)


def rng(seed=0):
    return np.random.default_rng(seed)


def counts_of(parts, labels=LABELS):
    return label_counts(parts, labels, int(labels.max()) + 1)


@pytest.mark.parametrize(
    "deal",
    [
        lambda: dirichlet(LABELS, 10, 0.05, 10, rng()),
        lambda: dirichlet(LABELS, 10, 100.0, 10, rng()),
        lambda: dirichlet_balanced(LABELS, 10, 0.05, 5, rng()),
        lambda: dirichlet_balanced(LABELS, 7, 0.5, 5, rng()),
        lambda: iid(LABELS, 7, rng()),
        lambda: label_skew(LABELS, 5, 2, 0, rng()),
        lambda: classes_per_client(LABELS, 10, 2, rng()),
    ],
)
def test_every_sample_goes_to_one_client(deal):
    parts = deal()
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    assert all(np.array_equal(part, np.sort(part)) for part in parts)


def test_a_small_alpha_is_more_heterogeneous():
    def variation(alpha):
        return heterogeneity(counts_of(dirichlet(LABELS, 10, alpha, 10, rng(1))))["total_variation"]

    assert variation(0.05) > variation(0.5) > variation(100.0)


def test_impossible_minimum_is_named():
    advice = "lower min_samples or train_fl.num_clients, or raise"
    with pytest.raises(PipelineError, match=f"cannot give each of 10 clients 101: {advice} prepare_data.train_subset"):
        dirichlet(LABELS, 10, 1.0, 101, rng())
    with pytest.raises(PipelineError, match=f"each of 2 clients has 2 of 4 samples: {advice} alpha"):
        dirichlet(np.array([0, 0, 0, 1]), 2, 1e-9, 2, rng())  # all of a class goes to one client


def test_the_balanced_variant_names_its_own_keys():
    with pytest.raises(PipelineError, match="half of a fair share: lower group_size or raise alpha"):
        dirichlet_balanced(np.zeros(20, np.int64), 5, 1e-9, 5, rng())  # one class, and all of it to one client


@pytest.mark.parametrize("alpha, variation, divergence", [(0.05, 0.685, 1.81), (0.2, 0.569, 1.32), (0.5, 0.443, 0.85)])
def test_the_balanced_variant_has_the_authors_statistics(alpha, variation, divergence):
    # measured with the authors' code on CIFAR-10's label counts, 10 clients, means over 5 seeds
    runs = [heterogeneity(counts_of(dirichlet_balanced(CIFAR, 10, alpha, 5, rng(seed)), CIFAR)) for seed in range(10)]
    assert np.mean([run["total_variation"] for run in runs]) == pytest.approx(variation, abs=0.03)
    assert np.mean([run["jensen_shannon_bits"] for run in runs]) == pytest.approx(divergence, abs=0.12)
    assert all(run["size_cv"] == 0 for run in runs)


@pytest.mark.parametrize("alpha, variation, divergence", [(0.05, 0.764, 2.33), (0.2, 0.603, 1.52), (0.5, 0.472, 0.95)])
def test_the_common_dirichlet_has_niid_benchs_statistics(alpha, variation, divergence):
    # the same for NIID-Bench's code, whose sizes and so whose statistics scatter more from seed to seed
    runs = [heterogeneity(counts_of(dirichlet(CIFAR, 10, alpha, 10, rng(seed)), CIFAR)) for seed in range(10)]
    assert np.mean([run["total_variation"] for run in runs]) == pytest.approx(variation, abs=0.06)
    assert np.mean([run["jensen_shannon_bits"] for run in runs]) == pytest.approx(divergence, abs=0.25)


def test_label_skew_equals_feddisco_on_cifar10():
    counts = counts_of(label_skew(CIFAR, 5, 2, 1, rng()), CIFAR)
    expected = np.zeros((6, 10), int)
    for client in range(5):
        expected[client, [2 * client, 2 * client + 1]] = 4165
    expected[5] = 833
    assert np.array_equal(counts, expected)


def test_label_skew_never_asks_for_more_than_a_class_has():
    # one class each and one unbiased: class c is wanted by its client and by the unbiased one, m + m/3 <= 30 -> m = 21
    labels = np.repeat([0, 1, 2], [30, 50, 40])
    counts = counts_of(label_skew(labels, 3, 1, 1, rng()), labels)
    assert counts.tolist() == [[21, 0, 0], [0, 21, 0], [0, 0, 21], [7, 7, 7]]
    with pytest.raises(PipelineError, match="does not fit"):
        label_skew(labels, 1, 4, 1, rng())


def test_classes_per_client():
    counts = counts_of(classes_per_client(LABELS, 20, 3, rng()))
    assert ((counts > 0).sum(1) == 3).all()
    assert all(counts[client, client % 10] for client in range(20))
    shares = [column[column > 0] for column in counts.T]
    assert all(share.max() - share.min() <= 1 for share in shares)


@pytest.mark.parametrize("factor, total", [(0.01, 12406), (0.1, 20431), (0.02, 13996)])
def test_long_tail_of_cifar10(factor, total):
    kept = long_tail(CIFAR, factor, rng())
    assert len(kept) == total
    if factor == 0.01:
        assert np.bincount(CIFAR[kept]).tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_long_tail_at_factor_one_keeps_an_unbalanced_set_whole():
    labels = np.repeat([0, 1, 2], [5, 30, 12])
    assert np.array_equal(long_tail(labels, 1.0, rng()), np.arange(47))


def test_by_domain():
    domains = np.repeat([0, 1, 2], [100, 50, 20])
    parts = by_domain(domains, [2, 1, 0], 0.2, rng())
    assert [len(part) for part in parts] == [20, 20, 10]
    assert [set(domains[part]) for part in parts] == [{0}, {0}, {1}]
    assert not set(parts[0]) & set(parts[1])
    assert even_clients_per_domain(7, 3) == [3, 2, 2]
    with pytest.raises(PipelineError, match="domain 2 has 20 samples, not 3 times 10"):
        by_domain(domains, [0, 0, 3], 0.5, rng())
    with pytest.raises(PipelineError, match="one number for each of the data set's 3 domains"):
        by_domain(domains, [1, 1], 0.5, rng())


def test_statistics_by_hand():
    # two clients of two classes: shares (1, 0) and (1/3, 2/3); pooled (1/2, 1/2) of 1 and 3 samples
    s = heterogeneity(np.array([[1, 0], [1, 2]]))
    assert s["total_variation"] == pytest.approx((1 / 2 + 1 / 6) / 2)
    assert s["emd"] == pytest.approx(2 * (1 / 2 + 1 / 6) / 2)
    entropy = -(1 / 3) * math.log2(1 / 3) - (2 / 3) * math.log2(2 / 3)
    assert s["jensen_shannon_bits"] == pytest.approx(1 - 3 / 4 * entropy)
    assert s["hellinger"] == pytest.approx(math.sqrt(1 - math.sqrt(1 / 3)))
    assert s["effective_classes"] == pytest.approx((1 + 2**entropy) / 2)
    assert s["classes_present"] == 1.5
    assert s["size_cv"] == pytest.approx(0.5)  # sizes 1 and 3: deviation 1, mean 2
    assert s["size_gini"] == pytest.approx(0.25)  # |1 - 3| twice of four pairs, over 2 * 2
    assert s["size_max_over_min"] == 3.0


def test_statistics_leave_out_an_empty_client():
    with_empty = heterogeneity(np.array([[4, 0], [0, 4], [0, 0]]))
    assert with_empty["total_variation"] == 0.5
    assert with_empty["size_max_over_min"] is None


def test_the_picture_is_the_same_bytes_each_time(tmp_path):
    counts = counts_of(dirichlet(LABELS, 4, 0.5, 10, rng()))
    names = [f"class & {k}" for k in range(10)]
    picture.write(tmp_path / "a.svg", counts, names)
    picture.write(tmp_path / "b.svg", counts, names)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert str(counts.max()) in (tmp_path / "a.svg").read_text()
