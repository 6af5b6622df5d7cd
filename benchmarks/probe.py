"""Compare linear probes on the cached denoising representations with one on raw pixels.

A probe is logistic regression on standardised inputs, fitted on four fifths of the training images and scored on the
rest (stratified; mean over a few splits); the test set is not used. Representations near chance level could not guide
training. The last line is JSON.

    python benchmarks/probe.py
"""

import json
from pathlib import Path

import click
import numpy as np
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

import stages.train_fl.methods  # noqa: F401  registers the settings of every method
from pipeline import provenance
from pipeline.data.datasets import PreparedDataset
from pipeline.feature_store import FeatureSet
from pipeline.settings import config
from stages.analyze_features.probes import linear_probe


@click.command()
@click.option("--params", type=click.Path(path_type=Path, exists=True), default="params.yaml")
@click.option("--splits", default=5, help="Random splits to average over.")
def main(params: Path, splits: int) -> None:
    """Print the accuracy of each probe."""
    settings = config.load(params)
    train = PreparedDataset(settings.dataset_dir).load("train")
    features = FeatureSet(settings.features_dir)
    rows = features.read(np.arange(len(train.labels)))
    inputs = {"raw pixels": train.images.reshape(len(train.labels), -1), "denoised, all layers": rows.denoised}
    for layer, (start, stop) in features.manifest.content.layers.items():
        inputs[f"denoised, {layer}"] = rows.denoised[:, start:stop]
    accuracy = {name: _probe(np.asarray(x, np.float64), train.labels, splits) for name, x in inputs.items()}
    chance = np.bincount(train.labels).max() / len(train.labels)
    click.echo(f"linear probe on {settings.features_dir.name}, {splits} splits; chance {100 * chance:.1f} %")
    for name, scores in accuracy.items():
        click.echo(f"  {name:<24} {inputs[name].shape[1]:>6} numbers  {100 * np.mean(scores):6.2f} %")
    click.echo(json.dumps({"accuracy": accuracy, "chance": chance, "provenance": provenance.describe()}))


def _probe(inputs: np.ndarray, labels: np.ndarray, splits: int) -> list[float]:
    folds = StratifiedShuffleSplit(splits, test_size=0.2, random_state=0)
    return cross_val_score(linear_probe(), inputs, labels, cv=folds).tolist()


if __name__ == "__main__":
    main()
