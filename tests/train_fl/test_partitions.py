"""Partitions and their statistics: coverage, hand-made counts, published numbers."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline import plotting
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
    left_out,
    long_tail,
    picture,
)
from stages.train_fl.partitions.dirichlet import _chance, _most_draws

LABELS = np.repeat(np.arange(10), 100)
CIFAR = np.repeat(np.arange(10), 5000)


def rng(seed=0):
    return np.random.default_rng(seed)


def counts_of(parts, labels=LABELS):
    return label_counts(parts, labels, int(labels.max()) + 1)


@pytest.mark.parametrize(
    "assign",
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
def test_every_sample_goes_to_one_client(assign):
    parts = assign()
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    assert all(np.array_equal(part, np.sort(part)) for part in parts)


def test_a_small_alpha_is_more_heterogeneous():
    def variation(alpha):
        return heterogeneity(counts_of(dirichlet(LABELS, 10, alpha, 10, rng(1))))["total_variation"]

    assert variation(0.05) > variation(0.5) > variation(100.0)


def test_impossible_minimum_is_reported():
    advice = "Lower min_samples or train_fl.num_clients, or raise"
    with pytest.raises(PipelineError, match=f"cannot give each of 10 clients 101. {advice} prepare_data.train_subset"):
        dirichlet(LABELS, 10, 1.0, 101, rng())
    with pytest.raises(PipelineError, match=f"each of 2 clients 2 of 4 samples. {advice} alpha"):
        dirichlet(np.array([0, 0, 0, 1]), 2, 1e-9, 2, rng())  # all of a class goes to one client


def test_balanced_variant_reports_its_own_settings():
    with pytest.raises(PipelineError, match="half of a fair share.* Lower group_size or raise alpha"):
        dirichlet_balanced(np.zeros(20, np.int64), 5, 1e-9, 5, rng())  # one class, and all of it to one client


@pytest.mark.parametrize("alpha, variation, divergence", [(0.05, 0.685, 1.81), (0.2, 0.569, 1.32), (0.5, 0.443, 0.85)])
def test_balanced_variant_has_the_statistics_of_the_authors_code(alpha, variation, divergence):
    # measured with the authors' code on CIFAR-10's label counts, 10 clients, means over 5 seeds
    runs = [heterogeneity(counts_of(dirichlet_balanced(CIFAR, 10, alpha, 5, rng(seed)), CIFAR)) for seed in range(10)]
    assert np.mean([run["total_variation"] for run in runs]) == pytest.approx(variation, abs=0.03)
    assert np.mean([run["jensen_shannon_bits"] for run in runs]) == pytest.approx(divergence, abs=0.12)
    assert all(run["size_cv"] == 0 for run in runs)


@pytest.mark.parametrize("alpha, variation, divergence", [(0.05, 0.764, 2.33), (0.2, 0.603, 1.52), (0.5, 0.472, 0.95)])
def test_dirichlet_has_the_statistics_of_niid_bench(alpha, variation, divergence):
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


def test_label_skew_uses_at_most_the_samples_of_a_class():
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


def test_long_tail_with_factor_one_keeps_all_samples():
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
    with pytest.raises(PipelineError, match="clients_per_domain does not fit 3 domains"):
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


def test_statistics_of_many_clients_equal_those_over_all_pairs():
    counts = rng().integers(0, 5, (1100, 3)) + [1, 0, 0]  # more clients than fit into two blocks
    sizes, roots = counts.sum(1), np.sqrt(counts / counts.sum(1)[:, None])
    pairs = list(itertools.combinations(range(1100), 2))
    first, second = np.array(pairs).T
    found = heterogeneity(counts)
    # the Hellinger distance is the root of half the squared distance of the roots
    distances = np.sqrt(((roots[first] - roots[second]) ** 2).sum(1) / 2)
    assert found["hellinger"] == pytest.approx(distances.mean(), abs=1e-9)
    differences = np.abs(sizes[first] - sizes[second]).sum() * 2 / 1100**2
    assert found["size_gini"] == pytest.approx(differences / (2 * sizes.mean()))


def test_statistics_ignore_empty_clients():
    with_empty = heterogeneity(np.array([[4, 0], [0, 4], [0, 0]]))
    assert with_empty["total_variation"] == 0.5
    assert with_empty["size_max_over_min"] is None


def test_heat_map_is_deterministic(tmp_path):
    counts = counts_of(dirichlet(LABELS, 4, 0.5, 10, rng()))
    names = [f"class & {k}" for k in range(10)]
    picture.write(tmp_path / "a.svg", counts, names)
    picture._drawn.cache_clear()
    picture.write(tmp_path / "b.svg", counts, names)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert str(counts.max()) in (tmp_path / "a.svg").read_text()


def test_heat_map_of_many_clients_shows_the_means_of_blocks(tmp_path):
    counts = np.zeros((1000, 300), np.int64)
    counts[:5, :2] = 10  # one block of 5 x 2 cells, and the last one, of a single class
    counts[-5:, 298:] = 5
    figure = Figure()
    image = plotting.heat_map(figure.add_subplot(), counts, "samples")
    shown = image.get_array()
    assert shown.shape == (200, 150) and image.colorbar.ax.get_ylabel() == "samples, mean of blocks of 5 x 2"
    assert shown[0, 0] == 10 and shown[-1, -1] == 5 and np.count_nonzero(shown) == 2
    picture.write(tmp_path / "a.svg", rng().integers(0, 50, (1000, 1000)), [f"class {k}" for k in range(1000)])
    assert (tmp_path / "a.svg").stat().st_size < 300_000


def test_hopeless_dirichlet_is_rejected_after_few_draws():
    # 14 samples a client, and at alpha 0.05 most clients get a class or none: of 50 about 32 get 10 samples
    labels = np.arange(1437) % 10
    with pytest.raises(
        PipelineError,
        match="^None of 10 draws .* gave each of 50 clients 10 of 1437 samples, and 10000 draws are unlikely to.",
    ):
        dirichlet(labels, 50, 0.05, 10, rng())


def test_the_number_of_draws_is_bounded_by_their_cost():
    assert _most_draws(10, 10) == 10_000
    assert _most_draws(10_000, 1_000) == 200  # of ten million shares each


def test_rare_dirichlet_is_drawn_until_it_fits_and_logged(caplog):
    caplog.set_level("INFO", "stages.train_fl.partitions")
    expected, generator, draws = None, rng(), 0  # the plain loop: draw by class until all have enough
    while expected is None or min(map(len, expected)) < 60:
        expected, draws = [[] for _ in range(10)], draws + 1
        for label in range(10):
            shuffled = generator.permutation(np.flatnonzero(LABELS == label))
            share = generator.dirichlet(np.full(10, 0.05)) * [len(part) < 100 for part in expected]
            if share.sum() == 0:
                share = np.array([len(part) < 100 for part in expected], float)
            cuts = (np.cumsum(share / share.sum())[:-1] * 100).astype(int)
            for part, assigned in zip(expected, np.split(shuffled, cuts), strict=True):
                part.extend(assigned)
    assert draws > 100
    for part, of_loop in zip(dirichlet(LABELS, 10, 0.05, 60, rng()), expected, strict=True):
        assert part.tolist() == sorted(of_loop)
    assert "partition: none of 100 draws fits, trying up to 10000" in caplog.text


def test_estimated_chance_is_an_upper_bound():
    # independent clients: 2 that always have enough and 3 that have it with chance 1/2 make 1/8
    draws = np.random.default_rng(0).random((400, 3)) < 0.5
    assert 1 / 8 < _chance((2 + draws.sum(1)).tolist(), 5) < 1 / 4
    # never seen in 1,000 draws of 2 clients: once in 1,000 / 3 is still possible
    assert 3e-3 <= _chance([1] * 1000, 2) < 4e-3
    # 10 of 50 lack it on the mean, with variance 25/4: as of 80/3 clients with chance 5/8 each, the rest always has it
    normal = np.random.default_rng(0).normal(40, (25 / 4 - 1 / 12) ** 0.5, 10_000).round().astype(int).tolist()
    estimate = (5 / 8) ** (80 / 3)
    assert estimate < _chance(normal, 50) < 2 * estimate


def test_unassigned_classes_and_samples_are_described():
    names = list("abcdefghij")
    parts = classes_per_client(LABELS, 3, 2, rng())  # clients 0, 1, 2 have classes 0, 1, 2 and one more each
    held = set(LABELS[np.concatenate(parts)])
    lacking = [names[label] for label in range(10) if label not in held]
    classes = {"classes": (LABELS, names)}
    lines = [f"{len(lacking)} of 10 classes go to no client: {', '.join(lacking)}"]
    assert 4 <= len(lacking) <= 7
    assert left_out(parts, classes) == [*lines, f"{100 * len(lacking)} of 1000 samples go to no client"]
    assert left_out(iid(LABELS, 7, rng()), classes) == []
    two = {"classes": (np.array([0, 0, 1]), ["x", "y"]), "domains": (np.array([0, 1, 1]), ["left", "right"])}
    assert left_out([np.array([0, 1]), np.array([], int)], two) == [
        "1 of 2 classes go to no client: y",
        "1 of 3 samples go to no client",
        "1 of 2 clients have no samples: 1",
    ]
    many = np.arange(13)
    assert left_out([many[:1]], {"domains": (many, [f"d{k}" for k in many])})[0].endswith("d9, d10 and 2 more")
