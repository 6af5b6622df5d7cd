"""Measure what FedDifRC loses because cached features cannot be conditioned on the clients' own models.

The paper conditions the prompts of TDCL on c = h(x), the feature that the model of the client has of the image, which
changes every round. A cache holds features that are fixed. Here the tiny frozen model runs inside the training loop,
and each variant conditions the same prompts differently:

    none      prompts alone: what `extract-features` caches by default
    frozen    on the initial network's feature: cacheable, as `extract_features.image_conditioning` is with CLIP
    local     on the feature of the model that the client receives in each round: the paper's

A feature is mapped to the width of the prompts' embeddings by fixed random orthonormal rows, scaled to --strength times
their mean norm, and added to every token. The variants share seeds, clients and initial weights.

    pipeline preset digits
    python benchmarks/local_conditioning.py --seeds 3
"""

import itertools
import json
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

import stages.train_fl.methods  # noqa: F401  registers the settings of every method
from pipeline import accuracy, provenance, seeding
from pipeline.diffusion.prompted_model import Inputs
from pipeline.diffusion.representation import Projector
from pipeline.progress import track
from pipeline.settings import config
from pipeline.settings.config import Config
from stages.extract_features import plan as planning
from stages.extract_features.run import load as load_extraction
from stages.train_fl import data as run_data
from stages.train_fl import guidance, rounds, session
from stages.train_fl.augmentation import to_model_range
from stages.train_fl.client_data import ClientData
from stages.train_fl.engines import local
from stages.train_fl.guidance import GuidanceTargets
from stages.train_fl.models import FLModel
from stages.train_fl.session import Job

ROOT = Path(__file__).parents[1]
VARIANTS = ("none", "frozen", "local")


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
@click.option("--params", "file", type=click.Path(path_type=Path), default=ROOT / "params.yaml", help="Parameter file.")
@click.option("--partition", default="nid1_005", show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Seeds 0 to SEEDS - 1.")
@click.option("--rounds", "num_rounds", type=int, help="Instead of train_fl.num_rounds.")
@click.option("--strength", default=1.0, show_default=True, help="Norm of the condition, relative to the prompts'.")
@click.option("--result", type=click.Path(path_type=Path), help="Also write the numbers to this JSON file.")
def main(file: Path, partition: str, seeds: int, num_rounds: int | None, strength: float, result: Path | None) -> None:
    """Train FedDifRC with each variant, and FedAvg."""
    overrides = {} if num_rounds is None else {"train_fl.num_rounds": num_rounds}
    project = config.load(file, overrides)
    runs = list(itertools.product(range(seeds), ("fedavg", *VARIANTS)))
    conditioned = Conditioned(project, strength)
    found: dict[str, list[float]] = {name: [] for name in ("fedavg", *VARIANTS)}
    for seed, name in track(runs, "runs", len(runs), "run"):
        found[name].append(train(project, partition, seed, name, conditioned))
    for name, values in found.items():
        gains = [accuracy.gain(values, found[other]) for other in ("fedavg", "none")]
        shown = "".join(f"{gain!s:>18}" for gain in gains if any(gain.by_seed))
        click.echo(f"{name:8}{accuracy.in_percent(values):>16}{shown}")
    numbers = {"partition": partition, "seeds": list(range(seeds)), "num_rounds": project.params.train_fl.num_rounds}
    numbers |= {"strength": strength, "accuracies": found, "provenance": provenance.describe()}
    click.echo(json.dumps(numbers))
    if result:
        result.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


class Conditioned:
    """The frozen model with the data set's images, encoded and noised once."""

    def __init__(self, project: Config, strength: float) -> None:
        """Load the model of the project, and use its feature set's basis."""
        plan = planning.make(project)
        self._extraction = load_extraction(plan)
        everything = np.arange(plan.feature_set.rows)
        self._noisy = self._extraction.clean_inputs(everything).noisy
        self._project, self._strength = project, strength
        states = self._extraction.session.model.conditioning.tensors["encoder_hidden_states"]  # (P, T, E)
        self._norm, self._width = states.norm(dim=-1).mean().item(), states.shape[-1]

    def targets(self, index: np.ndarray, features: Tensor, source: run_data.FederatedData) -> GuidanceTargets:
        """Return the prepared targets of the images at `index` for these features of them, float (n, F)."""
        with seeding.scoped_global_torch_seed(0, "conditioning"):
            rows = torch.nn.init.orthogonal_(torch.empty(features.shape[1], self._width))
        condition = self._strength * self._norm * torch.nn.functional.normalize(features @ rows, dim=1)
        assert source.features
        basis, content = source.features.basis(), source.features.manifest.content
        inputs = Inputs(self._noisy[index], condition)
        made, _ = self._extraction.represent(index, inputs, Projector(basis.layers, "cpu"), _NoBar())
        positive = torch.from_numpy(source.features.positive_prompts(made))
        raw = GuidanceTargets(torch.from_numpy(made.denoised), torch.from_numpy(made.prompted), positive)
        settings = self._project.settings("methods", "feddifrc")
        statistics = torch.from_numpy(basis.mean), torch.from_numpy(basis.std)
        return guidance.prepare(raw, settings, content.layers, *statistics)


class _NoBar:
    def update(self, _: float) -> None:
        pass


def train(project: Config, partition: str, seed: int, variant: str, conditioned: Conditioned) -> float:
    """Train as `train-fl` does, with the targets of a variant; return the run's accuracy."""
    name = "fedavg" if variant == "fedavg" else "feddifrc"
    job = Job(project, name, partition, seed)
    session.prepare_torch(project.params.runtime)
    data = run_data.load(project, name, partition, seed, "cpu")
    model, method = job.build(len(data.dataset.class_names), data.guidance_dim, len(data.clients), "cpu")
    evaluator = session.evaluator_of(method, data.clients, data.held_out)
    reached = []
    if variant == "frozen":
        for client, part in zip(data.clients, data.parts, strict=True):
            _replace(client, part, model, conditioned, data)
    generator = local.run(method, rounds.begin(method, session.weights_of(model)), data.clients, job.schedule)
    with_data = [client for client, own in enumerate(data.clients) if len(own)]
    for number in range(1, job.schedule.num_rounds + 1):
        if variant == "local":
            for client in rounds.sample_clients(with_data, job.schedule, number):
                _replace(data.clients[client], data.parts[client], model, conditioned, data)
        done = next(generator)
        reached.append(session.score_round(done, model, evaluator)["accuracy"])  # leaves the new weights in the model
    generator.close()
    return accuracy.of_run(reached)


@torch.inference_mode()
def _replace(
    client: ClientData, part: np.ndarray, model: FLModel, conditioned: Conditioned, data: run_data.FederatedData
) -> None:
    """Replace a client's prompted targets, in place, by those conditioned on the model's features."""
    model.eval()
    assert isinstance(client.images, Tensor) and isinstance(client.guidance, GuidanceTargets)
    features = model.embed(to_model_range(client.images))
    new = conditioned.targets(part, features, data)
    client.guidance.prompted.copy_(new.prompted)


if __name__ == "__main__":
    main()
