"""How well representations tell classes apart, with labels and without.

Linear probe: multinomial logistic regression, fitted on a part of the training images and judged on the rest of them,
the mean over a few stratified splits; the test split is never read. Clustering (the paper's Fig. 3): k-means with as
many clusters as classes, which sees no label, judged by purity, normalised mutual information and the adjusted Rand
index. All see each dimension standardised: energies of strong and weak components differ by orders of magnitude. The
price is that weak components, which are noise more often, count as much as strong ones. One thread computes all of it,
so that equal features give equal numbers on any number of cores.

The error of a share is the binomial's. The probe's splits overlap, in what they fit and in what they judge, so the
deviation over them would be too small an estimate (Nadeau and Bengio, Machine Learning 2003), and an image that several
hold out weighs as often: n is the effective number of images, (sum w)^2 / sum w^2 with w how often each is held out.
It is one representation's; two are judged on the same images, so that their difference is known
better than such errors say.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from pipeline import seeding
from pipeline.data.datasets import stratified_split
from pipeline.errors import PipelineError
from pipeline.settings.params import AnalyzeFeatures

_DRAWS = 20  # of clusters at random
_DIGITS = 6  # of a number that is written: beyond them processors differ


@dataclass(frozen=True)
class Scores:
    """Accuracy of the probe, 0 to 1, and its error; purity and NMI, 0 to 1, and ARI, at most 1, of the clusters."""

    probe_accuracy: float
    probe_error: float
    purity: float
    nmi: float
    ari: float


class Judge:
    """Judges representations of the same images, all by the same splits.

    Attributes:
        held_out: how many distinct images the probe is judged on: those held out by at least one split.
        effective_images: as many images, each judged once, would give its accuracy the same error (Kish, 1965).
    """

    def __init__(self, labels: np.ndarray, params: AnalyzeFeatures) -> None:
        """Cuts the images into splits.

        Args:
            labels: int64 (n,).
            params: fraction and number of the validation splits, and the seed.

        Raises:
            PipelineError: a probe could not be fitted or judged on so few images.
        """
        self._labels, self._params = labels, params
        self._num_classes = len(np.unique(labels))
        self._splits = list(self._draw_splits())
        _, times = np.unique(np.concatenate([held_out for _, held_out in self._splits]), return_counts=True)
        self.held_out, self.effective_images = len(times), float(times.sum() ** 2 / (times**2).sum())
        if any(len(np.unique(labels[fitted])) < 2 or not len(held_out) for fitted, held_out in self._splits):
            raise PipelineError(
                f"{len(labels)} images of {self._num_classes} classes are too few to fit a linear probe and judge it: "
                "take more images, or another analyze_features.validation_fraction"
            )

    def scores(self, features: np.ndarray) -> Scores:
        """Judges float (n, D)."""
        features = np.asarray(features, np.float64)
        with threadpool_limits(1):
            accuracy = np.mean([self._probe(features, *split) for split in self._splits])
            clusters = self._cluster(features)
            found = (
                accuracy,
                standard_error(float(accuracy), self.effective_images),
                purity(clusters, self._labels),
                normalized_mutual_info_score(self._labels, clusters),
                adjusted_rand_score(self._labels, clusters),
            )
        return Scores(*(round(float(value), _DIGITS) for value in found))

    def _draw_splits(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions to fit on, and held out."""
        count = round(self._params.validation_fraction * len(self._labels))
        for number in range(self._params.splits):
            rng = seeding.numpy_generator(self._params.seed, "validation split", number)
            held_out, fitted = stratified_split(self._labels, count, rng)
            yield fitted, held_out

    def _probe(self, features: np.ndarray, fitted: np.ndarray, held_out: np.ndarray) -> float:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        return probe.fit(features[fitted], self._labels[fitted]).score(features[held_out], self._labels[held_out])

    def _cluster(self, features: np.ndarray) -> np.ndarray:
        """Int (n,): the cluster of each image."""
        seed = seeding.derive(self._params.seed, "k-means") % 2**32
        k_means = KMeans(self._num_classes, n_init=10, random_state=seed)
        return k_means.fit_predict(StandardScaler().fit_transform(features))


def standard_error(share: float, count: float) -> float:
    """sqrt(p (1 - p) / n) of a share p of n images; 0 where it is of none or of all of them."""
    return math.sqrt(share * (1 - share) / count)


def purity(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that are of their cluster's most frequent class.

    Args:
        clusters: int (n,).
        labels: int64 (n,).
    """
    majorities = [np.bincount(labels[clusters == cluster]).max() for cluster in np.unique(clusters)]
    return sum(majorities) / len(labels)


def chance(labels: np.ndarray, prompts_per_image: int, seed: int) -> dict[str, float]:
    """What representations that tell nothing would reach, by measure.

    The probe: the most frequent class's share. Purity and NMI, which chance lifts above that and 0, the more so the
    fewer images a cluster has: the mean of twenty draws of as many clusters as classes, equally large. ARI: adjusted
    to 0.

    Args:
        labels: int64 (n,).
        prompts_per_image: P.
        seed: of the draws.
    """
    rng, in_turn = seeding.numpy_generator(seed, "chance"), np.arange(len(labels)) % len(np.unique(labels))
    drawn = [rng.permutation(in_turn) for _ in range(_DRAWS)]
    found = {
        "probe_accuracy": np.bincount(labels).max() / len(labels),
        "purity": np.mean([purity(clusters, labels) for clusters in drawn]),
        "nmi": np.mean([normalized_mutual_info_score(labels, clusters) for clusters in drawn]),
        "ari": 0.0,
        "matching_nearest": 1 / prompts_per_image,
    }
    return {measure: round(float(value), _DIGITS) for measure, value in found.items()}
