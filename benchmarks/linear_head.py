"""Measure what the guide's features give without a network: FedAvg over a linear classifier of them.

FedDifRC's networks see images, and the guide shapes their training only. Here a linear classifier sees the guide's
fused denoising features, standardised per dimension, so the frozen model has to run for every test image, too. Clients,
participants, rounds, epochs and batches are as many as in `train-fl`; features are cached, so nothing is augmented.
Every learning rate is tried. "central" is one logistic regression (scikit-learn, C = 1, not tuned) on the features of
seed 0's clients. Noise of the test images is drawn for positions after those of the training images.

    pipeline preset digits
    dvc repro extract-features
    python benchmarks/linear_head.py --seeds 5
"""

import dataclasses
import json
from pathlib import Path

import click
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

import stages.train_fl.methods  # noqa: F401  registers the settings of every method
from pipeline import accuracy, provenance, seeding, threads
from pipeline.diffusion import batching
from pipeline.errors import PipelineError
from pipeline.feature_store import Basis, FeatureSet
from pipeline.io import atomic
from pipeline.progress import progress_bar, track
from pipeline.settings import config
from pipeline.settings.config import Config
from pipeline.settings.params import TrainFL
from stages.extract_features import plan as planning
from stages.extract_features.extraction import HostInput
from stages.extract_features.plan import ExtractionPlan
from stages.extract_features.run import load as load_extraction
from stages.train_fl import data as run_data
from stages.train_fl import rounds
from stages.train_fl.data import FederatedData
from stages.train_fl.methods.arithmetic import weighted_mean
from stages.train_fl.rounds import Schedule

ROOT = Path(__file__).parents[1]
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
_AT_ONCE = 1000  # test images that are encoded together, which bounds the memory

Labelled = tuple[Tensor, Tensor]
"""Standardised features float32 (n, D), and labels int64 (n,)."""


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
@click.option("--params", "file", type=click.Path(path_type=Path), default=ROOT / "params.yaml", help="Parameter file.")
@click.option("--partition", default="nid1_005", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Seeds 0 to SEEDS - 1.")
@click.option("--rounds", "num_rounds", type=click.IntRange(min=1), help="Instead of train_fl.num_rounds.")
@click.option("--result", type=click.Path(path_type=Path), help="Also write the numbers to this JSON file.")
def main(file: Path, partition: str, seeds: int, num_rounds: int | None, result: Path | None) -> None:
    """Train the classifier with every rate and seed, and print its accuracy on the test images."""
    overrides = {"train_fl.evaluate_on": "test"} | ({"train_fl.num_rounds": num_rounds} if num_rounds else {})
    try:
        summary = measure(config.load(file, overrides), partition, seeds)
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    if result:
        atomic.write_json(result, summary)
    for rate, by_seed in summary["accuracies"].items():
        click.echo(f"rate {rate:8}{accuracy.in_percent(by_seed):>16}")
    click.echo(f"central      {100 * summary['central']:>16.2f}")
    click.echo(json.dumps(summary))


def measure(project: Config, partition: str, num_seeds: int) -> dict[str, object]:
    """Return the accuracies (0 to 1) by rate and seed, that of the central classifier, and what they were made of."""
    params, seeds = project.params.train_fl, range(num_seeds)
    data = [run_data.on_disk(project, "feddifrc", partition, seed) for seed in seeds]  # checks that the features fit
    num_classes, features = len(data[0].dataset.class_names), data[0].features
    assert features
    clients = [_clients(features, own) for own in data]
    test = held_out(planning.make(project), features)
    with threads.single(), torch.random.fork_rng():
        runs = [(rate, seed) for seed in seeds for rate in RATES]
        accuracies: dict[str, list[float]] = {f"{rate}": [] for rate in RATES}
        for rate, seed in track(runs, "runs", len(runs), "run"):
            schedule = dataclasses.replace(Schedule.of(params, seed), learning_rate=rate)
            accuracies[f"{rate}"].append(_federated(clients[seed], test, num_classes, schedule, params))
        central = _central(clients[0], test)
    return {
        "dataset": project.params.prepare_data.name,
        "partition": partition,
        "seeds": list(seeds),
        "num_rounds": params.num_rounds,
        "accuracies": accuracies,
        "central": central,
        "provenance": provenance.describe(),
    }


def held_out(plan: ExtractionPlan, features: FeatureSet) -> Labelled:
    """Compute the features of the test images on the basis of a set."""
    images, basis = plan.dataset.load("test"), features.basis()
    with batching.reproducible(plan.device, getattr(torch, plan.settings.dtype)), torch.inference_mode():
        extraction = load_extraction(plan)
        parts = []
        with progress_bar(len(images), "test images", "image") as bar:
            for start in range(0, len(images), _AT_ONCE):
                index = np.arange(start, min(start + _AT_ONCE, len(images)))
                noise = extraction.session.noise(plan.feature_set.rows + index)  # that of no training image
                host = HostInput(images.take(index).images, noise)
                inputs = extraction.inputs(host, extraction.session.encode(host.images))
                parts.append(extraction.pooled(inputs, basis.layers, bar))
    values = np.concatenate(parts).astype(np.float16)  # as the cache stores them
    return _standardised(values, basis), torch.from_numpy(images.labels)


def _clients(features: FeatureSet, data: FederatedData) -> list[Labelled]:
    basis, rows = features.basis(), (features.read(part) for part in data.parts)
    return [(_standardised(own.denoised, basis), torch.from_numpy(own.label)) for own in rows]


def _standardised(values: np.ndarray, basis: Basis) -> Tensor:
    return torch.from_numpy((values - basis.mean) / np.where(basis.std > 1e-6, basis.std, 1)).float()


def _federated(clients: list[Labelled], test: Labelled, num_classes: int, schedule: Schedule, params: TrainFL) -> float:
    """Train a linear classifier from zero by FedAvg; return its accuracy."""
    head = nn.Linear(test[0].shape[1], num_classes)
    weights = {name: torch.zeros_like(value) for name, value in head.state_dict().items()}
    with_data = [client_id for client_id, (_, labels) in enumerate(clients) if len(labels)]
    by_round = []
    for number in range(1, schedule.num_rounds + 1):
        participants = rounds.sample_clients(with_data, schedule, number)
        updates = []
        for client_id in participants:
            head.load_state_dict(weights)
            generator = seeding.torch_generator(schedule.seed, "linear head", number, client_id)
            _train(head, clients[client_id], schedule, schedule.learning_rate_of(number), params, generator)
            updates.append({name: value.clone() for name, value in head.state_dict().items()})
        weights = weighted_mean(updates, [len(clients[client_id][1]) for client_id in participants])
        head.load_state_dict(weights)
        with torch.no_grad():
            by_round.append((head(test[0]).argmax(1) == test[1]).double().mean().item())
    return accuracy.of_run(by_round)


def _train(
    head: nn.Linear, data: Labelled, schedule: Schedule, rate: float, params: TrainFL, generator: torch.Generator
) -> None:
    """Run a client's local SGD, in place."""
    values, labels = data
    optimiser = torch.optim.SGD(head.parameters(), rate, params.momentum, weight_decay=params.weight_decay)
    for _ in range(schedule.local_epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(schedule.batch_size):
            optimiser.zero_grad()
            functional.cross_entropy(head(values[batch]), labels[batch]).backward()
            if params.gradient_clipping:
                nn.utils.clip_grad_norm_(head.parameters(), params.gradient_clipping)
            optimiser.step()


def _central(clients: list[Labelled], test: Labelled) -> float:
    values, labels = (np.concatenate([client[item].numpy() for client in clients]) for item in (0, 1))
    return float(LogisticRegression(max_iter=2000).fit(values, labels).score(test[0].numpy(), test[1].numpy()))


if __name__ == "__main__":
    main()
