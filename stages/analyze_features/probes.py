"""Measure how well representations separate classes, with labels and without.

- Linear probe: multinomial logistic regression, fitted on a part of the training images and scored on the rest, as the
  mean over a few stratified splits. The test split is never read.
- Clustering (the paper's Fig. 3): k-means with as many clusters as classes and without labels, scored by purity,
  normalised mutual information and the adjusted Rand index.

Both standardise each dimension, because the energies of strong and weak components differ by orders of magnitude; weak
components, which are more often noise, then count as much as strong ones. Everything is computed on one thread, so that
equal features give equal numbers on any number of cores.

The standard error of a share is the binomial's. The probe's splits overlap, so the deviation over splits would
underestimate it (Nadeau and Bengio, Machine Learning 2003). Images that several splits hold out count repeatedly, so n
is the effective number of images, (sum w)^2 / sum w^2, where w is how often each is held out. The error is that of one
representation; the difference of two is known better, because both are scored on the same images.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from pipeline import seeding
from pipeline.data.datasets import stratified_split
from pipeline.errors import DataError
from pipeline.settings.params import AnalyzeFeatures

_DRAWS = 20  # random clusterings
_DIGITS = 6  # of a number that is written; later digits differ between processors


@dataclass(frozen=True)
class Scores:
    """Accuracy of the probe, 0 to 1, and its error; purity and NMI, 0 to 1, and ARI, at most 1, of the clusters."""

    probe_accuracy: float
    probe_error: float
    purity: float
    nmi: float
    ari: float


class ProbeEvaluator:
    """Scores representations of the same images, all by the same splits.

    `held_out` is the number of distinct images that at least one split holds out; `effective_images` is the number of
    images, each scored once, that would give the same error (Kish, 1965).
    """

    def __init__(self, labels: np.ndarray, params: AnalyzeFeatures) -> None:
        """Split n images with these labels, int64 (n,); raise DataError if there are too few for a probe."""
        self._labels, self._params = labels, params
        self._num_classes = len(np.unique(labels))
        self._splits = list(self._draw_splits())
        _, times = np.unique(np.concatenate([held_out for _, held_out in self._splits]), return_counts=True)
        self.held_out, self.effective_images = len(times), float(times.sum() ** 2 / (times**2).sum())
        if any(len(np.unique(labels[fitted])) < 2 or not len(held_out) for fitted, held_out in self._splits):
            raise DataError(
                f"{len(labels)} images of {self._num_classes} classes are too few to fit and score a linear probe. "
                "Use more images or another analyze_features.validation_fraction."
            )

    def scores(self, features: np.ndarray) -> Scores:
        """Score representations, float (n, D)."""
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
        """Yield, per split, the positions to fit on and those held out."""
        count = round(self._params.validation_fraction * len(self._labels))
        for number in range(self._params.splits):
            rng = seeding.numpy_generator(self._params.seed, "validation split", number)
            held_out, fitted = stratified_split(self._labels, count, rng)
            yield fitted, held_out

    def _probe(self, features: np.ndarray, fitted: np.ndarray, held_out: np.ndarray) -> float:
        probe = linear_probe().fit(features[fitted], self._labels[fitted])
        return probe.score(features[held_out], self._labels[held_out])

    def _cluster(self, features: np.ndarray) -> np.ndarray:
        """Return the cluster of each image, int (n,)."""
        seed = seeding.derive(self._params.seed, "k-means") % 2**32
        k_means = KMeans(self._num_classes, n_init=10, random_state=seed)
        return k_means.fit_predict(StandardScaler().fit_transform(features))


def linear_probe() -> Pipeline:
    """Return an unfitted linear probe: multinomial logistic regression on standardised inputs."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def standard_error(share: float, count: float) -> float:
    """Return sqrt(p (1 - p) / n), the standard error of a share p of n images."""
    return math.sqrt(share * (1 - share) / count)


def purity(clusters: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of n images that belong to the most frequent class of their cluster; both arguments are (n,)."""
    majorities = [np.bincount(labels[clusters == cluster]).max() for cluster in np.unique(clusters)]
    return sum(majorities) / len(labels)


def chance(labels: np.ndarray, prompts_per_image: int, seed: int) -> dict[str, float]:
    """Return the chance level of each measure: the score of representations without information.

    - Probe: the share of the most frequent class.
    - Purity and NMI, which chance lifts the more the fewer images a cluster has: the mean over twenty random
      clusterings into as many equal clusters as classes.
    - ARI: 0, to which it is adjusted.
    - Matching prompt nearest: one in P.
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
