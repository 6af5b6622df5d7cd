"""One run of a federated method, the same for every engine: resume, train, evaluate, write."""

import contextlib
import hashlib
import logging
import math
import os
import statistics
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline import accuracy, devices, manifests, provenance, run_digests
from pipeline.errors import TrainingDiverged
from pipeline.io import atomic, locks
from pipeline.progress import progress_bar
from pipeline.settings.config import Config
from pipeline.settings.params import Guidance, Nodes, Runtime, Section, TrainFL
from stages.train_fl import evaluate, feature_check, loggers, methods, models, records
from stages.train_fl.checkpoint import Checkpoint
from stages.train_fl.client_data import ClientData
from stages.train_fl.client_states import ClientStates, memory_limit
from stages.train_fl.data import FederatedData, HeldOut
from stages.train_fl.encoders import EncoderSettings, is_channels_last_faster
from stages.train_fl.evaluate import Classification, Evaluator
from stages.train_fl.methods import Method, Weights
from stages.train_fl.models import FLModel
from stages.train_fl.probes import Probes
from stages.train_fl.records import RunRecord
from stages.train_fl.rounds import Progress, Round, Schedule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run of the sweep: a method, a partition and a seed of a project."""

    config: Config
    method_name: str
    partition_name: str
    seed: int

    @property
    def params(self) -> TrainFL:
        """The settings that all methods share."""
        return self.config.params.train_fl

    @property
    def method(self) -> Section:
        """The method's settings."""
        return self.config.settings("methods", self.method_name)

    @property
    def guidance(self) -> Guidance | None:
        """The settings of the method's guidance, if it has any."""
        return methods.guidance_of(self.method)

    @property
    def method_class(self) -> type[Method]:
        """The class of the method."""
        return methods.method_class(self.method)

    @property
    def has_private_data(self) -> bool:
        """True if every client is a node with images of its own, so that no data set is partitioned."""
        return isinstance(self.config.settings("partitions", self.partition_name), Nodes)

    @property
    def schedule(self) -> Schedule:
        """Rounds, sampling and local training."""
        return Schedule.of(self.params, self.seed)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.config.run_dir(self.method_name, self.partition_name, self.seed)

    @property
    def name(self) -> str:
        """The run's name in messages, tables and checkpoints."""
        return manifests.run_name(self.path)

    def check(self) -> None:
        """Raise ConfigError if the settings do not suit the method."""
        methods.check(self.method_class, self.method, self.params.augmentation, f"methods.{self.method_name}")

    def build(
        self, num_classes: int, guidance_dim: int | None, num_clients: int, device: str
    ) -> tuple[FLModel, Method]:
        """Build the network, with the initial weights of the job's seed, and the method that trains it.

        `guidance_dim` is the length of the guidance targets; None for methods without guidance.
        """
        sizes = num_classes, guidance_dim, num_clients
        runtime = self.config.params.runtime
        settings = self.params, self.method, self.method_class
        return build(*settings, *sizes, self.seed, device, runtime.channels_last, runtime.cuda_graphs)

    def settings(self, data: FederatedData) -> dict[str, Any]:
        """Return everything that determines the run's results."""
        return {
            **self.config.settings_of_run(self.method_name, self.partition_name),
            "seed": self.seed,
            "dataset": {"name": data.dataset.name, "hash": data.dataset.hash},
            "features": data.features.manifest.fingerprint if data.features else None,
            "synthetic": data.synthetic_hash,
            **({"seen_images": seen} if data.features and (seen := feature_check.seen_images(data.features)) else {}),
            **({"feature_noise": noise} if data.features and (noise := feature_check.noise(data.features)) else {}),
        }

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of the run's folder; PipelineError if another process holds it."""
        return locks.held(self._lock(self.path), str(self.path))

    def publish(self) -> None:
        """Tell DVC of the finished run, if it belongs to the sweep: its digest and, after the last seed, the means."""
        config, names = self.config, (self.method_name, self.partition_name)
        if not (config.sweep_is_as_written and self.path in config.runs_of_sweep):
            return
        with locks.waited_for(self._lock(self.path.parent)):  # other processes may train other seeds
            run_digests.record(config.sweep_dir, self.path)
            records.write_means(
                config.means_file(*names), [config.run_dir(*names, seed) for seed in config.params.sweep.seeds]
            )

    def _lock(self, folder: Path) -> Path:
        place = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]  # a temporary copy of the project has its own
        return self.config.state_dir / "locks" / f"{manifests.run_name(folder)}-{place}"


class Engine(Protocol):
    """Computes the rounds of a run: `engines.local` in this process, `engines.flower` on nodes."""

    @property
    def name(self) -> str:
        """Names the engine in checkpoints: an engine does not resume from another's."""

    @property
    def device(self) -> str:
        """The device of the server's state."""

    @property
    def holds_states(self) -> bool:
        """Whether it keeps the clients' states on this machine; Flower's nodes keep their own."""

    @property
    def checkpoint_every(self) -> int:
        """Rounds between checkpoints."""

    def begin(self, weights: Weights) -> Progress:
        """Return the state before the first round, with these initial weights."""

    def rounds(self, start: Progress, states: ClientStates | None) -> Generator[Round, None, None]:
        """Run all rounds after `start`; `states` has the clients' states if it `holds_states`."""


def execute(
    job: Job,
    engine: Engine,
    model: FLModel,  # initial weights on entry, final weights on return; also used to evaluate each round
    evaluator: Evaluator,
    data: FederatedData | None,  # None if the clients' data are on nodes
    settings: dict[str, Any],  # everything that determines the run's results, for config.json
    overwrite: bool = False,  # replace a finished run of other settings or data
) -> None:
    """Run a job, or resume it from its checkpoint, and write all files of the run (see `records`).

    The caller holds the job's lock. The checksums are written last: they mark the run as complete.

    Raises:
        ConfigError: The folder holds a finished run of other settings or data.
        TrainingDiverged: A loss is not a finite number.
        PipelineError: A file cannot be written.
    """
    if not overwrite:
        records.check_replaceable(job.path, settings)
    device = str(next(model.parameters()).device)
    key = provenance.fingerprint(settings | _numerics(job.config.params.runtime, device, engine))[:16]
    folder = job.config.state_dir / "checkpoints" / f"{job.name}-{key}"
    states = ClientStates(folder / "states", memory_limit(device), device) if engine.holds_states else None
    checkpoint = Checkpoint(folder, states)
    start, rows = checkpoint.load(engine.device) or (engine.begin(weights_of(model)), None)
    records.start(job.path)  # removes a finished run, so everything that may be rejected comes before
    if data:
        records.write_partition(job.path, data)
    record = RunRecord(job.path, rows)
    _train(job, engine, start, model, evaluator, record, checkpoint)
    _write_results(job, model, evaluator, data, record)
    atomic.write_json(job.path / "config.json", settings | {"provenance": _provenance(device)})
    provenance.write_checksums(job.path)
    checkpoint.remove()
    job.publish()


def _train(
    job: Job,
    engine: Engine,
    start: Progress,
    model: FLModel,
    evaluator: Evaluator,
    record: RunRecord,
    store: Checkpoint,
) -> None:
    """Train all rounds after `start`; leaves the final global weights in `model`."""
    num_rounds = job.params.num_rounds
    model.load_state_dict(start.server.weights)
    if start.number:
        log.info("%s: resuming after round %d of %d", job.name, start.number, num_rounds)
    with (
        loggers.opened(job.config.params.runtime, job.config.home, job.name, record) as log_last_round,
        progress_bar(num_rounds, job.name, "round") as bar,
        contextlib.closing(engine.rounds(start, store.states)) as rounds,  # ends its processes after an error here, too
    ):
        bar.update(start.number)
        for done in rounds:
            started = time.perf_counter()
            scores = score_round(done, model, evaluator)
            record.add(done, scores, time.perf_counter() - started)
            log_last_round()
            if done.number % engine.checkpoint_every == 0 and done.number < num_rounds:
                store.save(done.progress, record.rows)
            bar.set_postfix_str(f"accuracy {scores['accuracy']:.3f}", refresh=False)
            bar.update()


def score_round(done: Round, model: FLModel, evaluator: Evaluator) -> dict[str, float]:
    """Load the global weights of a round into `model` and score it; TrainingDiverged if the loss is not finite."""
    model.load_state_dict(done.weights)
    scores = evaluator.scores(model)
    if not math.isfinite(scores["loss"]):
        raise TrainingDiverged(
            f"training diverged (the held-out loss of the global model after round {done.number} is "
            f"{scores['loss']}). Lower train_fl.learning_rate."
        )
    return scores


def _write_results(
    job: Job, model: FLModel, evaluator: Evaluator, data: FederatedData | None, record: RunRecord
) -> None:
    """Write the weights, accuracy by client and by domain, and the metrics."""
    details, metrics = record.details(), record.metrics()
    records.write_weights(job.path, model.state_dict())
    if data:
        predictor, extra = evaluator.final(model)
        num_classes = len(data.dataset.class_names)
        clients = evaluate.by_client(predictor, data.clients, data.held_out, data.cell_counts, num_classes)
        atomic.write_csv(job.path / "clients.csv", clients)
        domains = evaluate.by_domain(predictor, data.held_out, data.dataset.domain_names)
        details |= {"domain_accuracy": domains}
        metrics |= extra
        if len(domains) > 1:
            metrics |= {"mean_domain_accuracy": statistics.fmean(domains.values())}
    atomic.write_json(job.path / "details.json", details)
    atomic.write_json(job.path / "metrics.json", metrics)
    words = accuracy.rounds_in_words(job.params.num_rounds)
    log.info("%s: accuracy %.4f (%s)", job.name, metrics["mean_last5_accuracy"], words)


def prepare_torch(runtime: Runtime, num_threads: int = 1) -> str:
    """Make torch deterministic, set its number of threads, and return the device to train on.

    One thread makes results independent of the number of cores, and never waits for another, which on a busy machine
    takes longer than the work. On a GPU an operation without a deterministic implementation warns instead of failing.
    If the requested GPU is not available, it raises ConfigError.
    """
    device = devices.resolve(runtime.device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    # torch.use_deterministic_algorithms does the same, but imports torch's compiler first: 2 s.
    torch.set_deterministic_debug_mode("error" if device == "cpu" else "warn")
    # Deterministic algorithms would fill every new tensor, 5 % of a step on a CPU. Nothing here reads what it has not
    # written.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (a property that mypy misses)
    torch.set_num_threads(num_threads)
    return device


def build(
    params: TrainFL,
    settings: Section,
    kind: type[Method],
    num_classes: int,
    guidance_dim: int | None,
    num_clients: int,
    seed: int,
    device: str,
    channels_last: bool = True,
    cuda_graphs: bool = True,
) -> tuple[FLModel, Method]:
    """Build a network with the parts that a method needs and the initial weights of `seed`, and the method.

    On a GPU, it also sets the precision of products for the whole process.
    """
    if device.startswith("cuda"):
        # torch's own default is TF32 for convolutions and float32 for matrix products.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = params.precision == "tf32"
    channels_last = channels_last and is_channels_last_faster(params.model, params.normalisation, device)
    encoder = EncoderSettings(params.model, params.normalisation, params.precision, channels_last)
    parts = kind.model_parts(settings)
    model = models.build(encoder, num_classes, seed, guidance_dim, params.projection_dim, **parts).to(device)
    optimiser = (params.momentum, params.weight_decay)
    clipping = params.gradient_clipping
    return model, methods.build(settings, model, *optimiser, num_clients, clipping, kind, cuda_graphs)


def evaluator_of(method: Method, clients: list[ClientData], held_out: HeldOut, num_threads: int = 1) -> Evaluator:
    """Return the classifier's evaluator; for training without labels that of a k-NN classifier and a linear probe."""
    if method.needs_labels:
        return Classification(held_out, num_threads)
    return Probes(clients, held_out, method.settings.knn_neighbours, num_threads)


def weights_of(model: FLModel) -> Weights:
    """Return a copy of the model's state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _numerics(runtime: Runtime, device: str, engine: Engine) -> dict[str, Any]:
    """Return what may change the last bits of a result.

    Checkpoints promise byte-identical results, so they are keyed by it.
    """
    numerics: dict[str, Any] = {}
    if device.startswith("cuda"):
        versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        numerics = versions | {"gpu": provenance.processor(device)}
        device = "cuda"  # which of several equal GPUs does not matter
    return numerics | {
        "engine": engine.name,
        "device": device,
        "channels_last": runtime.channels_last,
        "torch": torch.__version__,
        "code": provenance.code_sha256(),  # not the commit, which an edit of params.yaml changes
    }


def _provenance(device: str) -> dict[str, Any]:
    """Describe software and hardware, and the code by its hash, by which `records` knows equal code."""
    return provenance.describe(device) | {"code": provenance.code_sha256()}
