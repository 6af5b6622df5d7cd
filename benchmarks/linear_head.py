"""Measure what the guide's features give without a network: FedAvg over a linear classifier on them.

FedDifRC's networks see images, and the guide only shapes their training. Here the classifier sees the guide's fused
denoising features, standardised as NDCR's targets are, so the frozen model also has to run for every held-out image.
Clients, participants, rounds, epochs and batch size are those of `train-fl`; each learning rate is tried. "central" is
one logistic regression on the features of all clients together.

    pipeline preset digits
    dvc repro extract-features
    python benchmarks/linear_head.py --seeds 5
"""

import dataclasses
import itertools
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
from pipeline.feature_store import FeatureSet
from pipeline.io import atomic
from pipeline.progress import progress_bar, track
from pipeline.settings import config
from pipeline.settings.params import TrainFL
from stages.extract_features import plan as planning
from stages.extract_features.plan import ExtractionPlan
from stages.extract_features.run import load as load_extraction
from stages.train_fl import data as run_data
from stages.train_fl import rounds
from stages.train_fl.methods.arithmetic import weighted_mean
from stages.train_fl.rounds import Schedule

ROOT = Path(__file__).parents[1]
_AT_ONCE = 1000  # held-out images that are encoded together, which bounds the memory
Client = tuple[Tensor, Tensor]
"""Standardised features float32 (n, D), and labels int64 (n,)."""


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
@click.option("--params", "file", type=click.Path(path_type=Path), default=ROOT / "params.yaml", help="Parameter file.")
@click.option("--partition", default="nid1_005", show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Seeds 0 to SEEDS - 1.")
@click.option("--rounds", "num_rounds", type=int, help="Instead of train_fl.num_rounds.")
@click.option("--rate", "rates", type=float, multiple=True, default=(0.001, 0.01, 0.1), show_default=True)
@click.option("--result", type=click.Path(path_type=Path), help="Also write the numbers to this JSON file.")
def main(
    file: Path, partition: str, seeds: int, num_rounds: int | None, rates: tuple[float, ...], result: Path | None
) -> None:
    """Train the classifier with every rate and seed, and print its accuracy on the test images."""
    project = config.load(file, {} if num_rounds is None else {"train_fl.num_rounds": num_rounds})
    plan = planning.make(project)
    features = FeatureSet(project.features_dir)
    test = _held_out(plan, features)
    names = [*(f"{rate:g}" for rate in rates), "central"]
    found: dict[str, list[float]] = {name: [] for name in names}
    runs = list(itertools.product(range(seeds), names))
    with threads.single():
        for seed, name in track(runs, "runs", len(runs), "run"):
            parts = run_data.on_disk(project, "fedavg", partition, seed).parts
            clients = [_client(features, part) for part in parts]
            if name == "central":
                found[name].append(_central(clients, test))
            else:
                schedule = dataclasses.replace(Schedule.of(project.params.train_fl, seed), learning_rate=float(name))
                found[name].append(_federated(clients, test, schedule, project.params.train_fl))
    numbers = {"partition": partition, "seeds": list(range(seeds)), "num_rounds": project.params.train_fl.num_rounds}
    numbers |= {"dataset": plan.dataset.name, "timestep": plan.settings.timestep}
    numbers |= {"accuracies": found, "provenance": provenance.describe()}
    if result:
        atomic.write_json(result, numbers)
    for name, values in found.items():
        click.echo(f"{name:8}{accuracy.in_percent(values):>16}")
    click.echo(json.dumps(numbers))


def _held_out(plan: ExtractionPlan, features: FeatureSet) -> Client:
    """Compute the features of the test images on the set's basis."""
    extraction, images, basis = load_extraction(plan), plan.dataset.load("test"), features.basis()
    extraction.data = images
    parts = []
    with progress_bar(len(images), "test images", "image") as bar, torch.inference_mode():
        for start in range(0, len(images), _AT_ONCE):
            inputs = extraction.clean_inputs(np.arange(start, min(start + _AT_ONCE, len(images))))
            parts.append(extraction.pooled(inputs, basis.layers, bar))
    return _standardised(np.concatenate(parts), features), torch.from_numpy(images.labels)


def _client(features: FeatureSet, part: np.ndarray) -> Client:
    rows = features.read(part)
    return _standardised(rows.denoised, features), torch.from_numpy(rows.label)


def _standardised(values: np.ndarray, features: FeatureSet) -> Tensor:
    basis = features.basis()
    return torch.from_numpy((values - basis.mean) / np.maximum(basis.std, 1e-6)).float()


def _federated(clients: list[Client], test: Client, schedule: Schedule, params: TrainFL) -> float:
    """Train a linear classifier from zero by FedAvg; return its accuracy."""
    head = nn.Linear(test[0].shape[1], int(test[1].max()) + 1)
    weights = {name: torch.zeros_like(value) for name, value in head.state_dict().items()}
    with_data = [client for client, (_, labels) in enumerate(clients) if len(labels)]
    reached = []
    for number in range(1, schedule.num_rounds + 1):
        participants = rounds.sample_clients(with_data, schedule, number)
        updates = []
        for client in participants:
            head.load_state_dict(weights)
            _train(head, clients[client], schedule, number, client, params)
            updates.append({name: value.clone() for name, value in head.state_dict().items()})
        weights = weighted_mean(updates, [len(clients[client][1]) for client in participants])
        head.load_state_dict(weights)
        reached.append((head(test[0]).argmax(1) == test[1]).double().mean().item())
    return accuracy.of_run(reached)


def _train(head: nn.Linear, client: Client, schedule: Schedule, number: int, of_client: int, params: TrainFL) -> None:
    rate, (values, labels) = schedule.learning_rate_of(number), client
    optimiser = torch.optim.SGD(head.parameters(), rate, params.momentum, weight_decay=params.weight_decay)
    generator = seeding.torch_generator(schedule.seed, "linear head", number, of_client)
    for _ in range(schedule.local_epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(schedule.batch_size):
            optimiser.zero_grad()
            functional.cross_entropy(head(values[batch]), labels[batch]).backward()
            if params.gradient_clipping:
                nn.utils.clip_grad_norm_(head.parameters(), params.gradient_clipping)
            optimiser.step()


def _central(clients: list[Client], test: Client) -> float:
    values, labels = (np.concatenate([own[item].numpy() for own in clients]) for item in (0, 1))
    return float(LogisticRegression(max_iter=2000).fit(values, labels).score(test[0].numpy(), test[1].numpy()))


if __name__ == "__main__":
    main()
