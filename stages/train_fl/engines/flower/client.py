"""A node's part of a run: it joins, trains the global model on its own images, and judges it on its own test images."""

import functools
import time
from dataclasses import dataclass

from flwr.app import Context, Message, MetricRecord, RecordDict

from pipeline.errors import PipelineError
from pipeline.federation import members
from pipeline.federation.node import Node, config_of, node_of, seed_of
from stages.train_fl import data as federation
from stages.train_fl import feature_check, methods, rounds
from stages.train_fl.data import FederatedData
from stages.train_fl.engines.flower.messages import Order, Work, to_tensors
from stages.train_fl.engines.flower.states import States
from stages.train_fl.methods import Method
from stages.train_fl.models import FLModel
from stages.train_fl.run import Job, build, evaluator_of, prepare_torch


@dataclass(frozen=True)
class Participant:
    """A node ready to train: its own data as a federation of one client, the network and the method."""

    node: Node
    job: Job
    device: str
    data: FederatedData
    model: FLModel
    method: Method


def join(message: Message, context: Context) -> RecordDict:
    """Checks the node's data and features; says who it is and what it must agree on with the others.

    Raises:
        PipelineError: it cannot take part.
    """
    me = _participant(context)
    features = me.data.features
    if features and me.job.of_nodes and features.manifest.content.basis_sha256 is None:
        raise PipelineError(
            f"{features.path} was projected on a PCA basis of its own images, whose axes are not those of other "
            "nodes: make the common one with --run-config 'task=\"basis\"', set extract_features.basis, and extract"
        )
    agreement = {
        "class_names": me.data.dataset.class_names,
        "image_size": me.data.dataset.image_size,
        "guidance_dim": me.data.guidance_dim,
        "features": features.manifest.content.common() if features else None,
    }
    return members.introduction(me.node.client_id, me.node.name, len(me.data.clients[0]), agreement)


def train(message: Message, context: Context) -> RecordDict:
    """One round of local training.

    Raises:
        PipelineError: its data are damaged, training diverged, or its state cannot be kept.
    """
    me = _participant(context)
    order = Order.read(next(iter(message.content.config_records.values())))
    records = dict(message.content.array_records)
    broadcast = to_tensors(records["broadcast"], device=me.device) if "broadcast" in records else {}
    weights = to_tensors(records["weights"], me.model.state_dict(), me.device)
    client, schedule = me.node.client_id, me.job.schedule()
    states = States(me.job.config.state_dir, order.key, client)
    state = states.load(order.state_of, me.device)
    batches = rounds.client_batches(me.data.clients[0], schedule, order.number, client, me.device)
    started = time.perf_counter()
    update, state, losses = me.method.client_update(
        weights,
        broadcast,
        me.method.init_client(weights) if state is None else state,
        batches,
        schedule.learning_rate_of(order.number),
    )
    rounds.check_finite(losses, client, order.number)
    states.save(order.number, state)
    return Work(update, losses, bool(state), batches.loading.seconds, time.perf_counter() - started).content()


def evaluate(message: Message, context: Context) -> RecordDict:
    """The global model on the node's own held-out images: accuracy and loss, and how many images.

    Raises:
        PipelineError: its data are damaged.
    """
    me = _participant(context)
    me.model.load_state_dict(to_tensors(message.content.array_records["weights"], me.model.state_dict(), me.device))
    scores = evaluator_of(me.job, me.data).scores(me.model)
    return RecordDict({"scores": MetricRecord({**scores, "num-images": len(me.data.held_out.labels)})})


def forget(message: Message, context: Context) -> RecordDict:
    """Drops what this client kept for a run that is finished."""
    node = node_of(context)
    key = Order.read(next(iter(message.content.config_records.values()))).key
    States(config_of(context.run_config, node.root).state_dir, key, node.client_id).remove()
    return RecordDict()


def _participant(context: Context) -> Participant:
    """The node's part, made once in each process."""
    told = tuple(sorted((key, value) for key, value in context.run_config.items()))
    return _make(node_of(context), told)


@functools.lru_cache(maxsize=8)  # a SuperNode is one client; a process of a simulation may be several in turn
def _make(node: Node, told: tuple[tuple[str, object], ...]) -> Participant:
    run_config = dict(told)
    config = config_of(run_config, node.root, node.device)
    job = Job(config, str(run_config["method"]), str(run_config["partition"]), seed_of(run_config))
    job.check()
    num_clients = config.params.train_fl.num_clients
    if job.of_nodes and node.client_id >= num_clients:
        raise PipelineError(f"client-id {node.client_id} is too high: train_fl.num_clients is {num_clients}")
    device = prepare_torch(config.params.runtime)
    guidance = methods.guidance_of(job.method)
    data = federation.load(config, job.partition_name, job.seed, guidance, device, node.client_id)
    if data.features:
        feature_check.check_method(data.features, job.method_name, job.without_labels)
    if not len(data.clients[0]):
        raise PipelineError(f"{config.dataset_dir} has no images for client {node.client_id}")
    model, method = build(job, len(data.dataset.class_names), data.guidance_dim, num_clients, device)
    return Participant(node, job, device, data, model, method)
