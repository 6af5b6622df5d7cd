"""Run the job of `train_job` in Flower's Ray simulation, written like Flower's PyTorch quickstart; print JSON."""

import functools
import json
import logging
import sys
import time

import flwr
import ray
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn import functional
from train_job import Job, seconds_per_round

from stages.train_fl.augmentation import to_model_range


def train(message: Message, context: Context, job: Job) -> Message:
    """Run local SGD on the node's images."""
    images, labels = _client(job, int(context.node_config["partition-id"]))
    model = job.model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), job.learning_rate, momentum=job.momentum, fused=True)
    for _ in range(job.local_epochs):
        for index in torch.randperm(len(labels)).split(job.batch_size):
            loss = functional.cross_entropy(model(to_model_range(images[index]))[1], labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(labels)})}
    return Message(content=RecordDict(content), reply_to=message)


@functools.cache
def _client(job: Job, client_id: int):
    """Make a client's data once in each of Ray's processes."""
    return job.client(client_id)


def serve(grid: Grid, context: Context, job: Job, marks: list[float]) -> None:
    """Run Flower's FedAvg, timed by its evaluation hook; fail unless all participants trained in every round."""
    strategy = FedAvg(
        fraction_train=job.clients_per_round / job.num_clients,
        fraction_evaluate=0.0,
        min_available_nodes=job.num_clients,
        train_metrics_aggr_fn=lambda contents, _: MetricRecord({"replies": len(contents)}),
    )
    result = strategy.start(
        grid,
        ArrayRecord(job.model().state_dict()),
        num_rounds=job.num_rounds,
        evaluate_fn=lambda number, _: marks.append(time.perf_counter()) if number else None,
    )
    replies = [metrics["replies"] for metrics in result.train_metrics_clientapp.values()]
    if replies != [job.clients_per_round] * job.num_rounds:
        raise RuntimeError(f"Clients failed ({replies} replies by round instead of {job.clients_per_round} in each).")


def main(job: Job) -> None:
    """Run the simulation, one client per core at a time. The clock starts before Ray does."""
    marks = [time.perf_counter()]
    logging.disable(logging.WARNING)
    server, client = ServerApp(), ClientApp()
    server.main()(functools.partial(serve, job=job, marks=marks))
    client.train()(functools.partial(train, job=job))
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=job.num_clients, backend_config=resources)
    versions = {"flwr": flwr.__version__, "ray": ray.__version__, "torch": torch.__version__}
    sys.stdout.write(json.dumps(seconds_per_round(marks) | {"versions": versions}) + "\n")


if __name__ == "__main__":
    import train_flower  # Ray's processes find functions by their module, which __main__ is not there

    train_flower.main(Job.from_json(sys.argv[1]))
