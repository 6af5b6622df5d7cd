"""The PCA basis of a feature set: fitted on a seeded sample of its images, or shared from another set.

Federated nodes that extract their own sets share one basis.h5, so that their features are comparable. The plot shows
the share of each layer's variance that its leading components explain.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline import feature_store, plotting, seeding
from pipeline.errors import FeatureSetError
from pipeline.feature_store import Basis

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def images(rows: int, wanted: int, seed: int) -> np.ndarray:
    """Draw the training images that a basis is fitted on: int64 (min(rows, wanted),), ascending."""
    order = seeding.numpy_generator(seed, "basis images").permutation(rows)
    return np.sort(order[:wanted])


def read_shared(file: Path, channels: dict[str, int], ranges: dict[str, list[int]]) -> Basis:
    """Read the basis.h5 of another set, for a set with these channels and columns by layer.

    Raise FeatureSetError if it is missing, or has other layers, channels or dimensions.
    """
    basis = feature_store.read_basis_file(file, list(channels))
    for layer, (start, stop) in ranges.items():
        found, wanted = basis.layers[layer].components.shape, (stop - start, channels[layer])
        if found != wanted:
            raise FeatureSetError(
                f"{file}: {layer} has {found[0]} components of {found[1]} channels, this set needs {wanted[0]} of "
                f"{wanted[1]}. Set extract_features.dims, layers and the backbone as they were when it was fitted."
            )
    if basis.mean.shape != (stop,) or basis.std.shape != (stop,):
        raise FeatureSetError(f"{file}: mean and std do not have {stop} dimensions. Use a complete basis.h5.")
    return basis


def explained(basis: Basis) -> dict[str, float]:
    """Return, by layer, the share of the variance that its components explain, 0 to 1."""
    return {
        name: float(layer.explained_variance.sum() / layer.total_variance) if layer.total_variance else 1.0
        for name, layer in basis.layers.items()
    }


@plotting.svg
def plot_explained_variance(basis: Basis) -> "Figure":
    """Draw, per layer, the share of variance explained by the first k components; equal bases give equal SVGs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(xlabel="components", ylabel="explained variance", ylim=(0, 1.02), xscale="log")
    for name, layer in basis.layers.items():
        share = layer.explained_variance.cumsum() / (layer.total_variance or 1)
        axes.plot(range(1, len(share) + 1), share, label=f"{name} ({len(share)} of {len(layer.mean)} channels)")
    longest = max(len(layer.explained_variance) for layer in basis.layers.values())
    axes.set_xticks([power for power in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if power <= longest])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend()
    axes.grid()
    return figure
