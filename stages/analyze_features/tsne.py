"""t-SNE of representations (van der Maaten and Hinton, JMLR 2008; the paper's Fig. 2), by scikit-learn.

At most `tsne_images` images are shown. It runs on one thread and starts from the first two principal components, so
that equal features give an equal picture.
"""

import numpy as np
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from pipeline import seeding
from pipeline.settings.params import AnalyzeFeatures


def choose(count: int, params: AnalyzeFeatures) -> np.ndarray:
    """Draw the images to show among `count`: ascending positions, int64."""
    order = seeding.numpy_generator(params.seed, "t-SNE images").permutation(count)
    return np.sort(order[: params.tsne_images])


def embed(features: np.ndarray, params: AnalyzeFeatures) -> np.ndarray:
    """Embed float (m, D), m >= 4, as float (m, 2); the perplexity is at most (m - 1) / 3."""
    standardised = StandardScaler().fit_transform(np.asarray(features, np.float64))
    perplexity = min(params.perplexity, (len(features) - 1) / 3)
    seed = seeding.derive(params.seed, "t-SNE") % 2**32
    with threadpool_limits(1):
        start = "pca" if features.shape[1] > 1 else "random"  # one dimension has no second component
        return TSNE(perplexity=perplexity, init=start, random_state=seed, n_jobs=1).fit_transform(standardised)
