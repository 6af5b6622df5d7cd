"""The server's part: a run whose clients are nodes, as `run.py` for the local engine.

It leaves the same files in results/<method>-<partition>/s<seed>, and participation.csv. If the partition divides one
data set, the server has the data too and evaluates as the local engine does. If every node has its own images, no file
describes the partition or single clients; the server evaluates on its own test images if it has any, and otherwise asks
the nodes. A checkpoint is written after every round.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from pipeline import provenance, seeding
from pipeline.data.datasets import PreparedDataset
from pipeline.errors import DataError, PipelineError
from pipeline.federation.members import Members
from pipeline.federation.node import config_of, project_of, seed_of
from stages.train_fl import data as run_data
from stages.train_fl import rounds, session
from stages.train_fl.data import FederatedData
from stages.train_fl.engines import workers
from stages.train_fl.engines.flower import privacy
from stages.train_fl.engines.flower.messages import TrainRequest, to_record
from stages.train_fl.engines.flower.strategy import FlowerEngine
from stages.train_fl.evaluate import Classification, Evaluator, Predictor
from stages.train_fl.methods import Method
from stages.train_fl.models import FLModel
from stages.train_fl.session import Job

log = logging.getLogger(__name__)


def serve(grid: Grid, run_config: Mapping[str, Any]) -> None:
    """Train one method over the nodes, resuming from a checkpoint if there is one.

    `run_config` has the method, partition, seed, changed settings, and the server's project folder.

    Raises:
        ConfigError: Settings do not fit each other, or the folder holds a finished run of others.
        TrainingDiverged: A loss is not a finite number.
        PipelineError: Another process is writing the run, or too few nodes joined or replied.
    """
    config = config_of(run_config, project_of(run_config))
    job = Job(config, str(run_config["method"]), str(run_config["partition"]), seed_of(run_config))
    job.check()
    with job.locked():  # before nodes load their data
        _run(job, grid, bool(run_config.get("overwrite")))


def _run(job: Job, grid: Grid, overwrite: bool) -> None:
    """Wait for the nodes, and train."""
    config = job.config
    device = session.prepare_torch(config.params.runtime)
    names = job.method_name, job.partition_name
    data = None if job.has_private_data else run_data.load(config, *names, job.seed, device, trains_here=False)
    num_clients = len(data.clients) if data else job.params.num_clients
    members = Members(grid, num_clients, config.params.federation)
    members.wait(for_all=True)  # otherwise the participants would be those that happen to connect first
    agreed = members.agreed
    model, method = job.build(len(agreed["class_names"]), agreed["guidance_dim"], num_clients, device)
    privacy.check(job, model)
    settings = _settings(job, data, agreed)
    run_key = provenance.fingerprint(settings)[:16]
    engine = FlowerEngine(job, method, members, grid, run_key)
    session.execute(job, engine, model, _evaluator(job, method, data, members, device), data, settings, overwrite)
    done = RecordDict({"request": TrainRequest(run_key, job.params.num_rounds, 0).record()})
    grid.push_messages(members.messages("query.forget", done))
    if engine.participation:
        log.info("%s", engine.participation.summary())


def _settings(job: Job, data: FederatedData | None, agreed: dict[str, Any]) -> dict[str, Any]:
    """Return everything that determines the run's results."""
    private = job.config.params.federation.model_dump(include={"differential_privacy"})
    protected = {"federation": private} if any(private.values()) else {}
    if data:
        return job.settings(data) | protected
    own = job.config.settings_of_run(job.method_name, job.partition_name)
    return {**own, "seed": job.seed, "agreed": agreed, **protected}


def _evaluator(job: Job, method: Method, data: FederatedData | None, members: Members, device: str) -> Evaluator:
    """Evaluate on the data set, on the server's own test images, or on the nodes."""
    num_threads = workers.resolve(job.config.params.runtime.workers, device)
    if data:
        return session.evaluator_of(method, data.clients, data.held_out, num_threads)
    folder = job.config.dataset_dir
    if folder.exists() and method.needs_labels:
        dataset = PreparedDataset(folder)
        if dataset.class_names != members.agreed["class_names"]:
            raise DataError(
                f"the classes of {folder} (the server's test images) differ from those of the nodes. Prepare the same "
                "classes, or remove the folder to evaluate on the nodes."
            )
        return Classification(run_data.held_out(dataset.load("test"), device), num_threads)
    params = job.config.params
    order = seeding.numpy_generator(job.seed, "evaluation clients").permutation(params.train_fl.num_clients)
    return NodeEvaluator(members, order.tolist(), params.federation.evaluation_clients)


class NodeEvaluator:
    """Scores the global model on the nodes' own held-out images: an `evaluate.Evaluator`."""

    def __init__(self, members: Members, order: list[int], most: Literal["all"] | int) -> None:
        """Ask at most so many members: the present ones that come first in this order of client ids.

        They are the same after every round, so that a curve shows the model's change and not that of the sample.
        """
        self._members, self._order, self._most = members, order, most

    def scores(self, model: FLModel) -> dict[str, float]:
        """Return accuracy and loss over the images of all nodes that answer; PipelineError if none does.

        Also return how many answered, and the bytes of the models sent for it.
        """
        present = self._members.answering()  # who was silent in this round's training would be waited for again
        asked = [present[client] for client in self._order if client in present]
        asked = asked if self._most == "all" else asked[: self._most]
        weights = RecordDict({"weights": to_record(model.state_dict())})
        answers = list(self._members.ask("evaluate", weights, _read_scores, asked).values())
        if not answers:
            raise PipelineError("no node evaluated the global model. Fix the nodes and run again to resume.")
        images = [answer["num-images"] for answer in answers]
        means = {
            name: float(np.average([own[name] for own in answers], weights=images)) for name in ("accuracy", "loss")
        }
        sent = len(asked) * rounds.num_bytes(model.state_dict())
        return means | {"evaluation_clients": len(answers), "evaluation_bytes": sent}

    def final(self, model: FLModel) -> tuple[Predictor, dict[str, float]]:
        """Raise: the images are on the nodes, so there is nothing to predict here."""
        raise NotImplementedError


def _read_scores(content: RecordDict) -> dict[str, float]:
    """Read a node's scores; DataError if they are invalid."""
    try:
        record = content.metric_records["scores"]
        found = {name: float(record[name]) for name in ("accuracy", "loss", "num-images")}  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"invalid scores ({error!r})") from None
    if not (0 <= found["accuracy"] <= 1 and np.isfinite(found["loss"]) and 0 < found["num-images"] < 2**40):
        raise DataError(f"invalid scores ({found})")
    return found
