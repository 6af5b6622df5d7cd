"""A node's part of a run: join, train the global model on its own images, evaluate it on its own test images."""

import functools
import logging
import time
from dataclasses import dataclass

from flwr.app import Context, Message, MetricRecord, RecordDict

from pipeline.errors import ConfigError, DataError, FeatureSetError
from pipeline.federation import members
from pipeline.federation.node import Node, config_of, node_of, seed_of
from pipeline.settings.config import Config
from stages.train_fl import data as run_data
from stages.train_fl import rounds, session
from stages.train_fl.client_states import ClientStates
from stages.train_fl.data import FederatedData
from stages.train_fl.engines.flower.messages import TrainReply, TrainRequest, to_tensors
from stages.train_fl.methods import Method
from stages.train_fl.models import FLModel
from stages.train_fl.session import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Participant:
    """A node that is ready to train: its data as those of a single client, the network and the method."""

    node: Node
    job: Job
    device: str
    data: FederatedData
    model: FLModel
    method: Method


def join(message: Message, context: Context) -> RecordDict:
    """Check the node's data and features, and return its introduction; PipelineError if it cannot take part."""
    own = _participant(context)
    features = own.data.features
    if features and own.job.has_private_data and features.manifest.content.basis_sha256 is None:
        raise FeatureSetError(
            f"{features.path} uses a PCA basis of the node's own images, whose axes differ between nodes. "
            "Make a common basis with --run-config 'task=\"basis\"', set extract_features.basis to its file, and "
            "extract again."
        )
    agreement = {
        "class_names": own.data.dataset.class_names,
        "image_size": own.data.dataset.image_size,
        "guidance_dim": own.data.guidance_dim,
        "features": features.manifest.content.common() if features else None,
    }
    return members.introduction(own.node.client_id, own.node.name, len(own.data.clients[0]), agreement)


def train(message: Message, context: Context) -> RecordDict:
    """Train for one round; PipelineError if data are damaged, training diverges or the state cannot be saved."""
    own = _participant(context)
    request = TrainRequest.read(message.content)
    arrays = dict(message.content.array_records)
    broadcast = to_tensors(arrays["broadcast"], device=own.device) if "broadcast" in arrays else {}
    weights = to_tensors(arrays["weights"], own.model.state_dict(), own.device)
    client, schedule = own.node.client_id, own.job.schedule
    states = _states(own.job.config, request.run_key, client, own.device)
    state = states.load(client, request.state_round)
    if request.state_round and state is None:
        log.warning("client %d has no usable state of round %d. Starting without one.", client, request.state_round)
    states.keep({client: request.state_round})
    batches = rounds.client_batches(own.data.clients[0], schedule, request.number, client, own.device)
    started = time.perf_counter()
    arguments = weights, broadcast, state, batches, schedule, request.number, client
    update, state, losses = rounds.update_client(own.method, *arguments)
    rounds.check_finite(losses, client, request.number)
    states.save(client, request.number, state)
    states.sync()
    seconds = batches.loading.seconds, time.perf_counter() - started
    return TrainReply(update, losses, bool(state), *seconds).content()


def evaluate(message: Message, context: Context) -> RecordDict:
    """Score the global model on the node's own held-out images."""
    own = _participant(context)
    arrays = message.content.array_records["weights"]
    own.model.load_state_dict(to_tensors(arrays, own.model.state_dict(), own.device))
    scores = session.evaluator_of(own.method, own.data.clients, own.data.held_out).scores(own.model)
    return RecordDict({"scores": MetricRecord({**scores, "num-images": len(own.data.held_out.labels)})})


def forget(message: Message, context: Context) -> RecordDict:
    """Remove the client's states of a finished run."""
    node = node_of(context)
    run_key = TrainRequest.read(message.content).run_key
    _states(config_of(context.run_config, node.root), run_key, node.client_id).remove()
    return RecordDict()


def _states(config: Config, run_key: str, client: int, device: str = "cpu") -> ClientStates:
    """Return the states of a run on this node: of its one client, in a folder that other nodes here do not use."""
    folder = config.state_dir / "federation" / run_key / f"client-{client:05d}"
    return ClientStates(folder, memory=0, device=device)


def _participant(context: Context) -> Participant:
    """Return the node's part, which each process builds once."""
    return _build(node_of(context), tuple(sorted(context.run_config.items())))


@functools.lru_cache(maxsize=8)  # a SuperNode is one client, but a process of a simulation may be several in turn
def _build(node: Node, run_items: tuple[tuple[str, object], ...]) -> Participant:
    run_config = dict(run_items)
    config = config_of(run_config, node.root, node.device)
    job = Job(config, str(run_config["method"]), str(run_config["partition"]), seed_of(run_config))
    job.check()
    num_clients = job.params.num_clients
    if job.has_private_data and node.client_id >= num_clients:
        raise ConfigError(
            f"client-id {node.client_id} is too high (train_fl.num_clients is {num_clients}). Use a lower one."
        )
    device = session.prepare_torch(config.params.runtime, node.threads)
    data = run_data.load(config, job.method_name, job.partition_name, job.seed, device, node.client_id)
    if not len(data.clients[0]):
        raise DataError(f"{config.dataset_dir} has no images for client {node.client_id}")
    model, method = job.build(len(data.dataset.class_names), data.guidance_dim, num_clients, device)
    return Participant(node, job, device, data, model, method)
