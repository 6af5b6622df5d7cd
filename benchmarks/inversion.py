"""Measure how much a shared feature set reveals about its images, by an attacker who inverts it.

The attacker has half of the images with their features (data of their own, passed through the public backbone), learns
a linear map from features to pixels (ridge regression), and applies it to the features of the other, hidden half.

    explained     share of the pixels' variance that the reconstructions explain; predicting the mean image gives 0
    identified    how often the hidden image nearest to a reconstruction is the right one; chance is 1 / their number
    label         accuracy of logistic regression on the features (every shard also contains the labels themselves)

    python benchmarks/inversion.py
"""

import json
from pathlib import Path

import click
import numpy as np
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import stages.train_fl.methods  # noqa: F401  registers the settings of every method
from pipeline import provenance, seeding
from pipeline.data.datasets import PreparedDataset
from pipeline.feature_store import FeatureSet
from pipeline.settings import config
from stages.analyze_features.probes import linear_probe

ROOT = Path(__file__).parents[1]


@click.command()
@click.option("--params", type=click.Path(path_type=Path), default=ROOT / "params.yaml", help="The parameter file.")
def main(params: Path) -> None:
    """Attack the project's own feature set."""
    project = config.load(params)
    features, images = FeatureSet(project.features_dir), PreparedDataset(project.dataset_dir).load("train")
    order = seeding.numpy_generator(0, "inversion").permutation(len(images))
    known, hidden = np.split(order, 2)
    pixels = images.images.mean(3).reshape(len(images), -1) / 255.0  # grey
    rows = features.read(np.arange(len(images)))
    kinds = {
        "denoised": rows.denoised,
        "denoised and prompted": np.concatenate([rows.denoised, rows.prompted.reshape(len(images), -1)], 1),
    }
    result = {}
    click.echo(f"{'features':24}{'numbers':>9}{'explained':>11}{'identified':>12}{'label':>8}")
    for name, values in kinds.items():
        values = values.astype(np.float64)
        row = result[name] = _attack(values, pixels, images.labels, known, hidden) | {"numbers": values.shape[1]}
        shares = f"{row['explained']:>11.1%}{row['identified']:>12.1%}{row['label']:>8.1%}"
        click.echo(f"{name:24}{row['numbers']:>9}{shares}")
    click.echo(f"chance of identifying one of {len(hidden)}: {1 / len(hidden):.1%}")
    click.echo(json.dumps({"hidden": len(hidden)} | result | {"provenance": provenance.describe()}))


def _attack(
    values: np.ndarray, pixels: np.ndarray, labels: np.ndarray, known: np.ndarray, hidden: np.ndarray
) -> dict[str, float]:
    inverse = make_pipeline(StandardScaler(), Ridge(10.0)).fit(values[known], pixels[known])
    guessed, truth = inverse.predict(values[hidden]), pixels[hidden]
    explained = 1 - ((guessed - truth) ** 2).sum() / ((truth - pixels[known].mean(0)) ** 2).sum()
    distances = (guessed**2).sum(1)[:, None] - 2 * guessed @ truth.T + (truth**2).sum(1)
    probe = linear_probe().fit(values[known], labels[known])
    return {
        "explained": float(explained),
        "identified": float((distances.argmin(1) == np.arange(len(hidden))).mean()),
        "label": float(probe.score(values[hidden], labels[hidden])),
    }


if __name__ == "__main__":
    main()
