"""Run the job of `train_job` in apple/pfl-research's simulator; print JSON."""

import json
import logging
import sys
import time
from importlib import metadata

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional
from train_job import Job, seconds_per_round

from stages.train_fl.augmentation import to_model_range


class Network(nn.Module):
    """The job's network with the two methods that pfl requires."""

    def __init__(self, job: Job) -> None:
        """Build the network."""
        super().__init__()
        self.network = job.model()

    def loss(self, images: Tensor, labels: Tensor, eval: bool = False) -> Tensor:
        """Return the mean cross-entropy."""
        self.train(not eval)
        return functional.cross_entropy(self.network(to_model_range(images))[1], labels)

    def metrics(self, images: Tensor, labels: Tensor, eval: bool = False) -> dict:
        """Return nothing; the benchmark does not evaluate."""
        return {}


class Clock(TrainingProcessCallback):
    """Record the time before training and after every round."""

    def __init__(self) -> None:
        """Start without marks."""
        self.marks: list[float] = []

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Record the start."""
        self.marks.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration: int):
        """Record the end of a round; never stop training."""
        self.marks.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    """Run the simulation in one process, as pfl does on one machine without a GPU."""
    job = Job.from_json(sys.argv[1])
    logging.disable(logging.WARNING)
    clients = [Dataset(raw_data=list(job.client(k)), user_id=str(k)) for k in range(job.num_clients)]
    sampler = get_user_sampler("minimize_reuse", list(range(job.num_clients)))
    data = FederatedDataset(lambda client: clients[client], sampler)
    network = Network(job)
    model = PyTorchModel(
        network,
        local_optimizer_create=lambda parameters, lr=job.learning_rate: torch.optim.SGD(
            parameters, lr, momentum=job.momentum, fused=True
        ),
        central_optimizer=torch.optim.SGD(network.parameters(), 1.0),
    )
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=job.num_rounds,
            evaluation_frequency=job.num_rounds + 1,
            train_cohort_size=job.clients_per_round,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        model,
        NNTrainHyperParams(
            local_num_epochs=job.local_epochs, local_learning_rate=job.learning_rate, local_batch_size=job.batch_size
        ),
        None,
        [clock],
        send_metrics_to_platform=False,
    )
    versions = {"pfl": metadata.version("pfl"), "torch": torch.__version__}
    sys.stdout.write(json.dumps(seconds_per_round(clock.marks) | {"versions": versions}) + "\n")


if __name__ == "__main__":
    main()
