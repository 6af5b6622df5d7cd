"""Runs one federated run: load -> partition -> clients -> method -> engine -> evaluate -> write.

`records` lists what it leaves in results/<run>. A killed run resumes from its last checkpoint and ends in the same
bytes (the seconds excepted).
"""

import contextlib
import hashlib
import logging
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import accuracy, devices, provenance, run_digests
from pipeline.errors import ConfigError, PipelineError
from pipeline.io import atomic, locks
from pipeline.progress import progress_bar
from pipeline.settings.config import Config
from pipeline.settings.params import Nodes, Runtime, Section
from stages.train_fl import data as federation
from stages.train_fl import evaluate, feature_check, loggers, methods, models, records, rounds
from stages.train_fl.checkpoint import Checkpoint
from stages.train_fl.data import FederatedData
from stages.train_fl.encoders import EncoderSettings
from stages.train_fl.engines import local
from stages.train_fl.evaluate import Classification, Evaluator
from stages.train_fl.methods import Method, Weights
from stages.train_fl.models import FLModel
from stages.train_fl.probes import Probes
from stages.train_fl.rounds import Progress, Round

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run of the sweep, by the names and settings that params.yaml gives it."""

    config: Config
    method_name: str
    partition_name: str
    seed: int

    @property
    def method(self) -> Section:
        """The method's settings."""
        return self.config.settings("methods", self.method_name)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.config.run_dir(self.method_name, self.partition_name, self.seed)

    @property
    def without_labels(self) -> bool:
        """Whether the method trains without labels."""
        return not methods.method_class(self.method).needs_labels

    @property
    def of_nodes(self) -> bool:
        """Whether every client is a node with images of its own, and nothing is dealt."""
        return isinstance(self.config.settings("partitions", self.partition_name), Nodes)

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Holds the run's folder, under any engine.

        Raises:
            PipelineError: another process holds it.
        """
        lock = f"{self.path.name}-{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:8]}"
        return locks.held(self.config.state_dir / "locks" / lock, str(self.path))

    def check(self) -> None:
        """Checks that the method can train as the settings say.

        Raises:
            PipelineError: it cannot.
        """
        needed = methods.method_class(self.method).needs_augmentation
        if needed and self.config.params.train_fl.augmentation == "none":
            raise ConfigError(
                f"{self.method_name} compares two views of an image (train_fl.augmentation is none). "
                "Set it to views or crop."
            )

    def seal(self) -> None:
        """Writes the checksums, which mark the run as whole, and what the report's stage depends on.

        Raises:
            PipelineError: they cannot be written.
        """
        provenance.write_checksums(self.path)
        run_digests.record(self.config, self.path)

    def schedule(self) -> rounds.Schedule:
        """Rounds, sampling and local training."""
        params = self.config.params.train_fl
        keys = (
            "num_rounds",
            "clients_per_round",
            "local_epochs",
            "batch_size",
            "learning_rate",
            "learning_rate_decay",
            "augmentation",
        )
        return rounds.Schedule(**params.model_dump(include=set(keys)), seed=self.seed)


def run(config: Config, method_name: str, partition_name: str, seed: int, overwrite: bool = False) -> Path:
    """Trains one method on one partition with one seed, going on from a checkpoint where there is one.

    Args:
        config: the project's configuration.
        method_name: an entry of `methods:`.
        partition_name: an entry of `partitions:`.
        seed: of everything random.
        overwrite: replace a finished run that other settings or data gave.

    Returns:
        The run's folder.

    Raises:
        PipelineError: a name is unknown, data or features are missing or do not belong together, the folder holds a
            finished run of other settings, or training diverged.
    """
    job = Job(config, method_name, partition_name, seed)
    job.check()
    guidance = methods.guidance_of(job.method)
    device = prepare_torch(config.params.runtime)
    data = federation.load(config, partition_name, seed, guidance, device)
    if data.features:
        feature_check.check_method(data.features, method_name, job.without_labels)
    model, method = build(job, len(data.dataset.class_names), data.guidance_dim, len(data.clients), device)
    if config.params.train_fl.clients_per_round > len(data.clients):
        log.warning("train_fl.clients_per_round is above the %d clients there are: all take part", len(data.clients))
    with job.locked():
        _make(job, data, model, method, device, overwrite)
    return job.path


def _make(job: Job, data: FederatedData, model: FLModel, method: Method, device: str, overwrite: bool) -> None:
    """Trains and writes all that a run leaves; the checksums last, which mark it as whole."""
    settings = settings_of(job, data)
    if not overwrite:
        records.check_replaceable(job.path, settings)
    key = provenance.fingerprint(settings | numerics(job.config, device))[:16]
    checkpoint = Checkpoint(job.config.state_dir / "checkpoints" / f"{job.path.name}-{key}")
    start, rows = checkpoint.load(device) or (rounds.begin(method, weights_of(model), len(data.clients)), None)
    records.start(job.path)  # removes what a finished run has, so only after all that may be refused
    records.write_partition(job.path, data)
    iterator = local.run(method, start, data.clients, job.schedule(), device)
    evaluator = evaluator_of(job, data)
    every = job.config.params.runtime.checkpoint_every
    record = train(job, model, start, rows, iterator, evaluator, checkpoint, every)
    finish(job, data, model, evaluator, record)
    atomic.write_json(job.path / "config.json", settings | {"provenance": provenance.describe(device)})
    job.seal()
    checkpoint.remove()


def prepare_torch(runtime: Runtime) -> str:
    """Sets torch to deterministic algorithms and the number of threads; returns the device to train on.

    On a GPU an operation that has no deterministic form warns instead of failing.

    Raises:
        PipelineError: a GPU is asked for and there is none.
    """
    device = devices.resolve(runtime.device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.use_deterministic_algorithms(True, warn_only=device != "cpu")
    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    return device


def build(
    job: Job, num_classes: int, guidance_dim: int | None, num_clients: int, device: str
) -> tuple[FLModel, Method]:
    """The network, its weights those of the job's seed, and the method that trains it.

    Args:
        job: names the method.
        num_classes: of the data set.
        guidance_dim: length of the targets, for methods with guidance.
        num_clients: N, all clients.
        device: where the network is placed.
    """
    params, runtime = job.config.params.train_fl, job.config.params.runtime
    encoder = EncoderSettings(params.model, params.normalisation, params.precision, runtime.channels_last)
    model = models.build(
        encoder,
        num_classes,
        job.seed,
        guidance_dim,
        params.projection_dim,
        **methods.model_parts(job.method),
    ).to(device)
    optimiser = (params.momentum, params.weight_decay)
    return model, methods.build(job.method, model, *optimiser, num_clients, params.gradient_clipping)


def evaluator_of(job: Job, data: FederatedData) -> Evaluator:
    """The classifier's accuracy, or for training without labels a k-NN classifier's and a linear probe's."""
    if job.without_labels:
        return Probes(data.clients, data.held_out, job.method.model_dump()["knn_neighbours"])
    return Classification(data.held_out)


def train(
    job: Job,
    model: FLModel,
    start: Progress,
    rows: dict[str, list[records.Row]] | None,
    rounds: Iterator[Round],
    evaluator: Evaluator,
    checkpoint: Checkpoint,
    checkpoint_every: int,
) -> records.RunRecord:
    """All rounds that are left, under any engine; leaves the last global weights in `model`.

    Args:
        job: the run.
        model: the network to evaluate in.
        start: the federation before the first of these rounds.
        rows: of the rounds before.
        rounds: from an engine, going on from `start`.
        evaluator: judges every round.
        checkpoint: where the run resumes if it is stopped.
        checkpoint_every: rounds between checkpoints.

    Raises:
        PipelineError: training diverged, or the engine gave up.
    """
    schedule = job.schedule()
    record = records.RunRecord(job.path, rows)
    model.load_state_dict(start.server.weights)
    if start.number:
        log.info("%s: going on after round %d of %d", job.path.name, start.number, schedule.num_rounds)
    with (
        loggers.watching(job.config, job.path.name, record) as watch,
        progress_bar(schedule.num_rounds, job.path.name, "round") as bar,
    ):
        bar.update(start.number)
        for done in rounds:
            started = time.perf_counter()
            model.load_state_dict(done.weights)
            scores = evaluator.scores(model)
            if not math.isfinite(scores["loss"]):
                raise PipelineError(
                    f"training diverged: the global model of round {done.number} has a held-out loss of "
                    f"{scores['loss']}; lower train_fl.learning_rate"
                )
            record.add(done, scores, time.perf_counter() - started)
            watch()
            if done.number % checkpoint_every == 0 and done.number < schedule.num_rounds:
                checkpoint.save(done.progress, record.rows)
            bar.set_postfix_str(f"accuracy {scores['accuracy']:.3f}", refresh=False)
            bar.update()
    return record


def weights_of(model: FLModel) -> Weights:
    """A copy of its whole state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def finish(job: Job, data: FederatedData, model: FLModel, evaluator: Evaluator, record: records.RunRecord) -> None:
    """Writes the weights, the accuracy by client and by domain, and the run in a few numbers."""
    predictor, extra = evaluator.final(model)
    records.write_weights(job.path, model.state_dict())
    clients = evaluate.by_client(
        predictor, data.clients, data.held_out, data.cell_counts, len(data.dataset.class_names)
    )
    records.write_csv(job.path / "clients.csv", clients)
    domains = evaluate.by_domain(predictor, data.held_out, data.dataset.domain_names)
    atomic.write_json(job.path / "details.json", record.details() | {"domain_accuracy": domains})
    if len(domains) > 1:
        extra = extra | {"mean_domain_accuracy": statistics.fmean(domains.values())}
    metrics = record.metrics() | extra
    atomic.write_json(job.path / "metrics.json", metrics)
    words = accuracy.rounds_in_words(job.config.params.train_fl.num_rounds)
    log.info("%s: accuracy %.4f (%s)", job.path.name, metrics["mean_last5_accuracy"], words)


def settings_of(job: Job, data: FederatedData) -> dict[str, Any]:
    """All that decides the run."""
    return {
        **job.config.settings_of_run(job.method_name, job.partition_name),
        "seed": job.seed,
        "dataset": {"name": data.dataset.name, "hash": data.dataset.hash},
        "features": data.features.manifest.fingerprint if data.features else None,
        "synthetic": data.synthetic_hash,
    }


def numerics(config: Config, device: str) -> dict[str, Any]:
    """What moves the last bits of a number, and so belongs to a checkpoint that promises equal bytes."""
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "channels_last": config.params.runtime.channels_last,
        "torch": torch.__version__,
        "code": provenance.git_commit() or provenance.code_sha256(),
    }
