"""The entry point of the stage: one federated run of params.yaml on the local engine.

A run that was interrupted resumes from its last checkpoint with identical results, except for the seconds. A complete
run is kept, because DVC repeats the stage, with all its seeds, if one is added.
"""

import logging
from pathlib import Path
from typing import Any

from pipeline.data.datasets import PreparedDataset
from pipeline.settings.config import Config
from stages.train_fl import data as run_data
from stages.train_fl import records, session
from stages.train_fl.data import FederatedData
from stages.train_fl.engines import workers
from stages.train_fl.engines.local import LocalEngine
from stages.train_fl.session import Job

log = logging.getLogger(__name__)


def run(config: Config, method_name: str, partition_name: str, seed: int, overwrite: bool = False) -> Path:
    """Train one method on one partition with one seed, resuming from a checkpoint if there is one.

    A finished run of the same settings and data is kept, with a warning if other software made it; delete its folder
    to train it again.

    Args:
        config: The project's configuration.
        method_name: An entry of `methods:` in params.yaml.
        partition_name: An entry of `partitions:`.
        seed: Seed of everything random.
        overwrite: Replace a finished run of other settings or data.

    Returns:
        The run's folder; `records` lists its files.

    Raises:
        ConfigError: A name is unknown, settings do not fit each other, or the folder holds a finished run of others.
        DataError: The data set is missing or damaged.
        FeatureSetError: The feature set is missing, damaged, or does not fit the data set and the settings.
        TrainingDiverged: A loss is not a finite number.
        PipelineError: Another process is writing the run, or a file cannot be written.
    """
    job = Job(config, method_name, partition_name, seed)
    job.check()
    PreparedDataset(config.dataset_dir).warn_if_unlike(config.params.prepare_data)
    device = session.prepare_torch(config.params.runtime)
    data = run_data.on_disk(config, method_name, partition_name, seed)
    settings = job.settings(data)
    with job.locked():
        if records.is_complete(job.path, settings):
            is_other = records.is_of_other_software(job.path)
            level, origin = (logging.WARNING, ", made by other code or versions") if is_other else (logging.INFO, "")
            log.log(level, "%s is complete already%s. To train it again, delete %s.", job.name, origin, job.path)
            job.publish()
        else:
            _train(job, data.placed(device), settings, device, overwrite)
    return job.path


def _train(job: Job, data: FederatedData, settings: dict[str, Any], device: str, overwrite: bool) -> None:
    num_clients = len(data.clients)
    if job.params.clients_per_round > num_clients:
        log.warning("train_fl.clients_per_round exceeds the number of clients: all %d take part", num_clients)
    model, method = job.build(len(data.dataset.class_names), data.guidance_dim, num_clients, device)
    runtime = job.config.params.runtime
    num_workers = workers.resolve(runtime.workers, device)
    engine = LocalEngine(method, data.clients, job.schedule, device, num_workers, runtime.checkpoint_every)
    evaluator = session.evaluator_of(method, data.clients, data.held_out, num_workers)
    session.execute(job, engine, model, evaluator, data, settings, overwrite)
