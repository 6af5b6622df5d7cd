"""A run whose clients are nodes: what run.py is to the local engine.

It leaves the same folder, results/<method>-<partition>-s<seed>, and participation.csv beside the rest. Where the
partition is dealt, as train-fl does it, the server has the data too and the folder is a run's as any other; where every
node has its own images, the server knows of clients what they say, and judges the model on its own test images if it
has the data set, else by asking the nodes. A checkpoint is written after every round.
"""

import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, Strategy

from pipeline import provenance
from pipeline.data.datasets import PreparedDataset
from pipeline.errors import PipelineError
from pipeline.federation.members import Members
from pipeline.federation.node import config_of, project_of, seed_of
from pipeline.io import atomic
from pipeline.settings.params import CentralPrivacy
from stages.train_fl import data as federation
from stages.train_fl import methods, records
from stages.train_fl.checkpoint import Checkpoint
from stages.train_fl.data import FederatedData
from stages.train_fl.engines.flower import privacy
from stages.train_fl.engines.flower.messages import to_record
from stages.train_fl.engines.flower.participation import Account
from stages.train_fl.engines.flower.strategy import Exchange, MethodStrategy, plain_exchange, run
from stages.train_fl.evaluate import Classification, Evaluator, Predictor
from stages.train_fl.methods import Method
from stages.train_fl.models import FLModel
from stages.train_fl.rounds import Progress
from stages.train_fl.run import (
    Job,
    build,
    evaluator_of,
    finish,
    numerics,
    prepare_torch,
    settings_of,
    train,
    weights_of,
)

log = logging.getLogger(__name__)


def serve(grid: Grid, run_config: Mapping[str, Any]) -> None:
    """Runs one method over the nodes, going on from a checkpoint where there is one.

    Args:
        grid: Flower's connection to the nodes.
        run_config: method, partition, seed, set, and the server's project folder.

    Raises:
        PipelineError: settings or nodes do not fit together, too few come, or training diverged.
    """
    config = config_of(run_config, project_of(run_config))
    job = Job(config, str(run_config["method"]), str(run_config["partition"]), seed_of(run_config))
    job.check()
    device = prepare_torch(config.params.runtime)
    data = _own_data(job, device)
    with job.locked():
        _Run(job, grid, data, device).make(overwrite=bool(run_config.get("overwrite")))


def _own_data(job: Job, device: str) -> FederatedData | None:
    """All clients' data where the partition is dealt; None where the nodes have their own."""
    if job.of_nodes:
        return None
    return federation.load(job.config, job.partition_name, job.seed, methods.guidance_of(job.method), device)


class _Run:
    """One run, from the first node that joins to the last file."""

    def __init__(self, job: Job, grid: Grid, data: FederatedData | None, device: str) -> None:
        self._job, self._grid, self._data, self._device = job, grid, data, device
        self._params = job.config.params.federation
        self._num_clients = len(data.clients) if data else job.config.params.train_fl.num_clients
        self._members = Members(grid, self._num_clients, self._params.join_timeout)

    def make(self, overwrite: bool) -> None:
        """Trains and writes all that the run leaves; the checksums last, which mark it as whole."""
        job, num_clients = self._job, self._num_clients
        # A start waits for all: else who trains would be whoever came first.
        self._members.wait(self._params.min_clients, self._params.join_timeout, wanted=num_clients)
        agreed = self._members.agreed
        model, method = build(job, len(agreed["class_names"]), agreed["guidance_dim"], num_clients, self._device)
        privacy.check(job, model)
        settings = self._settings()
        if not overwrite:
            records.check_replaceable(job.path, settings)
        records.start(job.path)
        key = provenance.fingerprint(settings | numerics(job.config, self._device) | {"engine": "flower"})[:16]
        checkpoint = Checkpoint(job.config.state_dir / "checkpoints" / f"{job.path.name}-{key}")
        start, rows = checkpoint.load("cpu") or (self._begin(method, model, num_clients), None)
        core = MethodStrategy(method, start, job.schedule(), self._members, self._params, key)
        account = Account(job.path, start.number)
        engine, evaluator = run(core, self._exchange(core), account.write), self._evaluator(core)
        record = train(job, model, start, rows, engine, evaluator, checkpoint, checkpoint_every=1)
        self._finish(model, evaluator, record)
        account.draw()
        made_by = provenance.describe(self._device) | {"code": provenance.code_sha256()}
        atomic.write_json(job.path / "config.json", settings | {"provenance": made_by})
        job.seal()
        checkpoint.remove()
        self._grid.push_messages(core.farewell())
        log.info("%s", "\n".join(account.summary()))

    @staticmethod
    def _begin(method: Method, model: FLModel, num_clients: int) -> Progress:
        """Before the first round; what clients keep is on their own disks, of which the server knows the rounds."""
        weights = {name: value.cpu() for name, value in weights_of(model).items()}
        return Progress(0, method.init_server(weights), [{} for _ in range(num_clients)])

    def _settings(self) -> dict[str, Any]:
        """All that decides the run."""
        params = self._params.model_dump(include={"differential_privacy", "secure_aggregation"})
        protected = {"federation": params} if any(params.values()) else {}
        if self._data:
            return settings_of(self._job, self._data) | protected
        return {
            **self._job.config.settings_of_run(self._job.method_name, self._job.partition_name),
            "seed": self._job.seed,
            "agreed": self._members.agreed,
            **protected,
        }

    def _exchange(self, core: MethodStrategy) -> Exchange:
        timeout = self._params.round_timeout
        if self._params.secure_aggregation is not None:
            from stages.train_fl.engines.flower import secure

            return secure.secure_exchange(core, self._grid, timeout, self._params.secure_aggregation)
        strategy: Strategy = core
        private = self._params.differential_privacy
        if isinstance(private, CentralPrivacy):
            expected = min(self._job.config.params.train_fl.clients_per_round, len(core.progress.clients))
            strategy = DifferentialPrivacyClientSideFixedClipping(
                core, private.noise_multiplier, private.clipping_norm, expected
            )
        return plain_exchange(strategy, core, self._grid, timeout)

    def _evaluator(self, core: MethodStrategy) -> Evaluator:
        """By all the data, by the server's own test images, or by the nodes."""
        if self._data:
            return evaluator_of(self._job, self._data)
        folder = self._job.config.dataset_dir
        if folder.exists() and not self._job.without_labels:
            dataset = PreparedDataset(folder)
            if dataset.class_names != self._members.agreed["class_names"]:
                raise PipelineError(f"{folder}, the server's own test images, has other classes than the nodes'")
            return Classification(federation.held_out(dataset, self._device))
        return ByNodes(core, self._grid, self._params.round_timeout)

    def _finish(self, model: FLModel, evaluator: Evaluator, record: records.RunRecord) -> None:
        path = self._job.path
        if self._data:
            records.write_partition(path, self._data)
            finish(self._job, self._data, model, evaluator, record)
        else:
            records.write_weights(path, model.state_dict())
            atomic.write_json(path / "details.json", record.details())
            atomic.write_json(path / "metrics.json", record.metrics())


class ByNodes:
    """Every node that is present judges the global model on its own held-out images; an `evaluate.Evaluator`."""

    def __init__(self, core: MethodStrategy, grid: Grid, timeout: float) -> None:
        """Asks the members of `core`."""
        self._core, self._grid, self._timeout = core, grid, timeout

    def scores(self, model: FLModel) -> dict[str, float]:
        """Accuracy and loss over all nodes' images.

        Raises:
            PipelineError: no node answered.
        """
        number, arrays = self._core.progress.number, to_record(model.state_dict())
        orders = self._core.configure_evaluate(number, arrays, ConfigRecord(), self._grid)
        replies = self._grid.send_and_receive(orders, timeout=self._timeout)
        means = self._core.aggregate_evaluate(number, replies)
        if means is None:
            raise PipelineError(f"round {number}: no node judged the model; run again, it goes on from there")
        return {name: float(value) for name, value in means.items()}  # type: ignore[arg-type]

    def final(self, model: FLModel) -> tuple[Predictor, dict[str, float]]:
        """There is no predictor: the images are elsewhere."""
        raise NotImplementedError
