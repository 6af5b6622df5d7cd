"""Measure how much a shared feature set reveals about its images, and what giving away less costs.

An attacker has half of the images with their features (data of their own, passed through the public backbone), learns
a linear map from features to pixels (ridge regression), and applies it to the features of the other, hidden half.

    explained     share of the pixels' variance that the reconstructions explain; predicting the mean image gives 0
    identified    how often the hidden image nearest to a reconstruction is the right one; chance is 1 / their number
    recognised    how often the row nearest to an image's own features is its row, for who has the image and the model
    label         accuracy of logistic regression on the features (every shard also contains the labels themselves)
    gain          with --seeds: accuracy of FedDifRC trained from these features minus that of FedAvg, seed by seed,
                  and the half-width of its 95 % interval (Student's t over seeds)

The rows change what is shared: fewer dimensions per layer (the first of the PCA), 8-bit integers (`storage: int8`),
Gaussian noise with a multiple of each dimension's standard deviation, one of the two representations, or each class's
mean over all images in place of an image's prompted representations (needs `extract_features.negatives: all`).

    python benchmarks/inversion.py
    pipeline preset digits-ablation
    python benchmarks/inversion.py --partition nid1_005 --seeds 5 --jobs 2 --figure docs/gallery/privacy.svg
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import click
import numpy as np
from matplotlib.figure import Figure
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import stages.train_fl.methods  # noqa: F401  registers the settings of every method
from pipeline import accuracy, plotting, provenance, seeding
from pipeline.data.datasets import Images, PreparedDataset
from pipeline.feature_store import Features, FeatureSet
from pipeline.feature_store.int8 import Int8
from pipeline.progress import track
from pipeline.settings import config
from pipeline.settings.config import Config
from stages.analyze_features.probes import linear_probe
from stages.train_fl import data as run_data
from stages.train_fl.simulation import DEFAULTS, Samples, simulate

ROOT = Path(__file__).parents[1]

Change = Callable[["SharedSet", Features], dict[str, np.ndarray]]


class SharedSet(FeatureSet):
    """A feature set whose rows are changed when they are read."""

    def __init__(self, path: Path, change: Change) -> None:
        """Open the set in folder `path`."""
        super().__init__(path)
        self._change = change
        own = self.basis()
        self.mean, self.std = own.mean, own.std

    def read(self, index: np.ndarray) -> Features:
        """Return the changed rows."""
        rows = super().read(index)
        return dataclasses.replace(rows, **self._change(self, rows))

    @functools.cached_property
    def class_means(self) -> np.ndarray:
        """Each prompt's mean representation over all images, float16 (P, D)."""
        return FeatureSet.read(self, np.arange(len(self))).prompted.mean(0, dtype=np.float64).astype(np.float16)


def _as_is(features: SharedSet, rows: Features) -> dict[str, np.ndarray]:
    return {}


def _without(part: str) -> Change:
    return lambda features, rows: {part: np.zeros_like(getattr(rows, part))}


def _first_dims(count: int) -> Change:
    """Keep `count` dimensions per layer; the others become constant: zero, or the mean, which training subtracts."""

    def change(features: SharedSet, rows: Features) -> dict[str, np.ndarray]:
        dropped = np.concatenate(
            [np.arange(start + count, stop) for start, stop in features.manifest.content.layers.values()]
        ).astype(int)
        denoised, prompted = rows.denoised.copy(), rows.prompted.copy()
        denoised[:, dropped], prompted[:, :, dropped] = features.mean[dropped], 0
        return {"denoised": denoised, "prompted": prompted}

    return change


def _int8(features: SharedSet, rows: Features) -> dict[str, np.ndarray]:
    """Return what `extract_features.storage: int8` keeps."""
    coder = Int8(features.basis())
    return {name: coder.decode(coder.encode(getattr(rows, name))) for name in ("denoised", "prompted")}


def _noise(multiple: float) -> Change:
    def change(features: SharedSet, rows: Features) -> dict[str, np.ndarray]:
        # The owner adds it once, so a row has the same noise whenever it is read.
        changed = {name: getattr(rows, name).astype(np.float32) for name in ("denoised", "prompted")}
        for position, index in enumerate(rows.index.tolist()):
            generator = seeding.numpy_generator(0, "shared noise", index)
            for values in changed.values():
                values[position] += multiple * features.std * generator.standard_normal(values[position].shape)
        return {name: values.astype(np.float16) for name, values in changed.items()}

    return change


def _class_means(denoised: bool) -> Change:
    """Give all images the same prompted representations, the means over the set, which tell nothing of an image."""

    def change(features: SharedSet, rows: Features) -> dict[str, np.ndarray]:
        changed = {} if denoised else {"denoised": np.zeros_like(rows.denoised)}
        return changed | {"prompted": np.broadcast_to(features.class_means, rows.prompted.shape).copy()}

    return change


CHANGES: dict[str, Change] = {
    "as it is": _as_is,
    "denoised only": _without("prompted"),
    "prompted only": _without("denoised"),
    "class means only": _class_means(denoised=False),
    "class means, denoised": _class_means(denoised=True),
    **{f"{count} dims per layer": _first_dims(count) for count in (24, 12, 6, 3)},
    "int8": _int8,
    **{f"noise {multiple:g}": _noise(multiple) for multiple in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)},
}


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
@click.option("--params", "file", type=click.Path(path_type=Path), default=ROOT / "params.yaml", help="Parameter file.")
@click.option("--partition", default="dir005", show_default=True, help="Partition of the federated runs.")
@click.option("--seeds", default=0, show_default=True, help="Seeds of the federated runs; 0 runs none.")
@click.option("--jobs", default=1, show_default=True, help="Runs at a time, in processes of one thread.")
@click.option("--figure", type=click.Path(path_type=Path), help="Write a picture of privacy against accuracy (SVG).")
@click.option("--earlier", type=click.File(), help="Output of an earlier run, whose rows belong into the picture, too.")
@click.option("--only", type=click.Choice(list(CHANGES)), multiple=True, help="Measure only this row; repeatable.")
def main(
    file: Path,
    partition: str,
    seeds: int,
    jobs: int,
    figure: Path | None,
    earlier: TextIO | None,
    only: tuple[str, ...],
) -> None:
    """Attack the project's own feature set."""
    result = measure(config.load(file), partition, seeds, list(only or CHANGES), jobs)
    click.echo(json.dumps(result | {"provenance": provenance.describe()}))
    rows = result["rows"]
    if earlier:
        before = json.loads(earlier.read().splitlines()[-1])
        if before["fedavg"] != result["fedavg"]:
            raise click.UsageError(
                f"{earlier.name} has other seeds or settings: its FedAvg differs. Run all rows again."
            )
        rows = before["rows"] | rows
    if figure and seeds:
        figure.write_text(_picture(rows), encoding="utf-8")


def measure(project: Config, partition: str, seeds: int, names: list[str], jobs: int = 1) -> dict[str, Any]:
    """Print a row for each name, and return all numbers."""
    images = PreparedDataset(project.dataset_dir).load("train")
    known, hidden = np.split(seeding.numpy_generator(0, "inversion").permutation(len(images)), 2)
    runs = [(name, seed) for name in ("fedavg", *names) for seed in range(seeds)]
    train = functools.partial(_accuracy, project, partition, jobs)
    with contextlib.ExitStack() as stack:
        trained = map(train, runs)
        if jobs > 1:  # not forked: a fork would inherit torch's threads
            pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
            trained = stack.enter_context(pool).map(train, runs)
        found = dict(zip(runs, track(trained, "runs", len(runs), "run"), strict=True))
    baseline = [found["fedavg", seed] for seed in range(seeds)]
    rows: dict[str, dict[str, Any]] = {}
    click.echo(
        f"{'shared':24}{'numbers':>9}{'explained':>11}{'identified':>12}{'recognised':>12}{'label':>8}{'gain':>8}"
    )
    original = FeatureSet(project.features_dir).read(np.arange(len(images)))
    for name in names:
        shared = SharedSet(project.features_dir, CHANGES[name])
        row = rows[name] = _attack(original, shared, images, known, hidden)
        line = f"{name:24}{row['numbers']:>9}{row['explained']:>11.1%}{row['identified']:>12.1%}"
        line += f"{row['recognised']:>12.1%}{row['label']:>8.1%}"
        if seeds:
            gain = accuracy.gain([found[name, seed] for seed in range(seeds)], baseline)
            half_width = float("nan") if gain.half_width is None else gain.half_width
            row |= {"gain": gain.mean, "half_width": half_width, "gains": gain.by_seed}
            line += f"{100 * row['gain']:>8.1f} ± {100 * row['half_width']:.1f}"
        click.echo(line)
    click.echo(f"chance of identifying one of {len(hidden)}: {1 / len(hidden):.1%}")
    return {"hidden": len(hidden), "partition": partition, "fedavg": baseline, "rows": rows}


def _numbers(rows: Features) -> np.ndarray:
    """Return all numbers of each image, float64 (n, numbers)."""
    return np.concatenate([rows.denoised, rows.prompted.reshape(len(rows), -1)], 1).astype(np.float64)


def _nearest(points: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Return for each of n points, float (n, d), the position of the nearest of m candidates, float (m, d)."""
    return ((candidates**2).sum(1) - 2 * points @ candidates.T).argmin(1)


def _attack(
    original: Features, shared: SharedSet, images: Images, known: np.ndarray, hidden: np.ndarray
) -> dict[str, float]:
    rows = shared.read(np.arange(len(images)))
    pixels = images.images.mean(3).reshape(len(images), -1) / 255.0  # grey
    values, own = _numbers(rows), _numbers(original)
    differ = values.std(0) > 0
    numbers = int(differ.sum())
    scale = np.tile(shared.std, 1 + rows.prompted.shape[1])[differ] + 1e-12  # of the noise, if there is some
    recognised = _nearest(own[hidden][:, differ] / scale, values[hidden][:, differ] / scale)
    values = values[:, differ] if numbers else np.zeros((len(rows), 1))
    inverse = make_pipeline(StandardScaler(), Ridge(10.0)).fit(values[known], pixels[known])
    guessed, truth = inverse.predict(values[hidden]), pixels[hidden]
    explained = 1 - ((guessed - truth) ** 2).sum() / ((truth - pixels[known].mean(0)) ** 2).sum()
    probe = linear_probe().fit(values[known], images.labels[known])
    return {
        "numbers": numbers,
        "explained": float(explained),
        "identified": float((_nearest(guessed, truth) == np.arange(len(hidden))).mean()),
        "recognised": float((recognised == np.arange(len(hidden))).mean()),
        "label": float(probe.score(values[hidden], images.labels[hidden])),
    }


def _accuracy(project: Config, partition: str, jobs: int, run: tuple[str, int]) -> float:
    """Train FedAvg, or FedDifRC with the features that are shared under `name`, as `pipeline train-fl` does.

    Return the mean accuracy of the last five rounds.
    """
    name, seed = run
    data = run_data.load(project, "fedavg", partition, seed, "cpu")
    train, settings = data.dataset.load("train"), project.params.train_fl
    features, section = None, project.settings("methods", "fedavg")
    if name != "fedavg":
        features, section = SharedSet(project.features_dir, CHANGES[name]), project.settings("methods", "feddifrc")
        rows = features.read(np.arange(2))
        parts = {"tdcl_weight": rows.prompted, "ndcr_weight": rows.denoised}  # what is not shared cannot guide
        section = section.model_copy(update={key: 0.0 for key, values in parts.items() if not values.any()})
    clients = [Samples(train.images[part], train.labels[part], features, part) for part in data.parts]
    held_out = Samples(data.held_out.images.to("cpu").permute(0, 2, 3, 1), data.held_out.labels)
    own = settings.model_dump(include=set(DEFAULTS))
    workers: Any = "auto" if jobs == 1 else 1
    history = simulate(section, clients, held_out, seed=seed, device="cpu", num_workers=workers, **own)
    return accuracy.of_run([row["accuracy"] for row in history.rows])


@plotting.svg
def _picture(result: dict[str, dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.add_subplot()
    axes.grid()
    places: list[tuple[float, float]] = []
    for name, row in result.items():
        place = 100 * row["identified"], 100 * row["gain"]
        near = sum(abs(x - place[0]) < 8 and abs(y - place[1]) < 0.6 for x, y in places)  # whose text would be under it
        places.append(place)
        axes.errorbar(*place, yerr=100 * row["half_width"], fmt="o", color="#0072B2", ecolor="#0072B255", capsize=2)
        axes.annotate(name, place, xytext=(5, 4 - 10 * near), textcoords="offset points", fontsize=8)
    axes.axhline(0, color=plotting.INK, lw=0.8)
    axes.set(xlabel="hidden images identified, %", ylabel="gain of FedDifRC over FedAvg, points")
    return figure


if __name__ == "__main__":
    main()
