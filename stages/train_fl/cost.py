"""Estimate what a run would do and cost before it runs: steps and time, bytes in memory, sent and on disk.

Steps, participants and bytes are those of the run with this seed. Time is measured on a few batches of the largest
client and of the held-out images, and that to start on the estimate itself. It leaves out reading data that do not fit
into memory, and the k-NN search and linear probe of methods without labels. On a GPU, whose clients train side by side
in streams, it is that of one after the other. The feature set need not exist yet. Nothing is written.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from pipeline import estimates, seeding
from pipeline.errors import ConfigError
from pipeline.settings.config import Config
from pipeline.text import duration, size
from stages.train_fl import data as run_data
from stages.train_fl import placement, planned, records, rounds, session
from stages.train_fl.client_data import Batches, ClientData
from stages.train_fl.data import FederatedData
from stages.train_fl.engines import workers
from stages.train_fl.evaluate import CPU_BATCH, in_batches
from stages.train_fl.methods import Method, Weights
from stages.train_fl.models import FLModel
from stages.train_fl.placement import Placement, Sizes
from stages.train_fl.rounds import Schedule
from stages.train_fl.session import Job

_TIMED_BATCHES = 3
_TIMED_IMAGES = 256
_TIMED_ROWS = 4096  # read from the disk
_TIMED_CLIENTS = 100
_INDEX_BYTES = 40  # of a Python integer in a list, as it is written to partition.json
_MORE_DESCRIPTORS = 3  # the lock of the run, a file that is being written, and its folder


@dataclass(frozen=True)
class Estimate:
    """The work and the cost of a run; bytes where no unit is given."""

    name: str
    clients: int
    clients_with_data: int
    participants: int  # per round
    rounds: int
    samples: int  # of all clients
    steps: int  # of all clients in all rounds
    evaluated: int  # images that the busiest thread evaluates, in all rounds and at the end
    sizes: Sizes
    where: Placement
    features_exist: bool
    model: int
    down: int  # to one participant in one round
    up: int  # from it
    server_state: int
    client_states: int  # of all clients that take part in any round
    free_space: str  # for the checkpoint
    start_seconds: float  # until the first round
    seconds_per_step: float
    seconds_per_image: float  # of evaluation
    workers: int
    device: str
    process: list[str]
    in_place: str  # what exists already, in words
    is_finished: bool  # with these settings, so that nothing is left to do

    @property
    def seconds(self) -> float:
        """The time of the run, if it is not finished."""
        training = self.steps * self.seconds_per_step / self.workers
        return self.start_seconds + training + self.evaluated * self.seconds_per_image

    def lines(self) -> list[str]:
        """Return the estimate as lines of text."""
        each_round = self.participants * (self.down + self.up)
        places = {
            "device": "in memory" if self.device == "cpu" else f"on {self.device}",
            "host": "in host memory",
            "disk": "read from disk batch by batch",
        }
        empty = self.clients - self.clients_with_data
        targets = f"{size(self.sizes.guidance)}, {places[self.where.guidance]}" if self.sizes.guidance else "none"
        targets += "" if self.features_exist else " (of a set that is yet to be extracted)"
        at_a_time = f"{self.workers} at a time" if self.device == "cpu" else "less with clients side by side"
        return [
            f"run           {self.name}",
            f"clients       {self.clients}{f', {empty} of them without samples' if empty else ''}; {self.participants} "
            f"per round, {self.rounds} rounds",
            f"steps         {self.steps} in all, {self.samples} training images",
            f"images        {size(self.sizes.images)}, {places[self.where.images]}",
            f"held out      {size(self.sizes.held_out)}, {places[self.where.held_out]}",
            f"guidance      {targets}",
            f"model         {size(self.model)}",
            f"sent          {size(self.down)} to and {size(self.up)} from a participant, {size(each_round)} per round, "
            f"{size(each_round * self.rounds)} in all",
            f"checkpoint    {size(self.server_state)} of the server, {size(self.client_states)} of the clients "
            f"({self.free_space})",
            *self.process,
            *([f"in place      {self.in_place}"] if self.in_place else []),
            f"time          {duration(self.seconds)} on {self.device}, {at_a_time} "
            f"({duration(self.start_seconds)} to start, then {1e3 * self.seconds_per_step:.3g} ms per step, "
            "after timing a few batches)",
        ]


def total(estimates: list[Estimate]) -> str:
    """Return a line with the time of several runs that one process makes one after the other."""
    left = [one for one in estimates if not one.is_finished]
    finished = f", {len(estimates) - len(left)} of them finished" if len(left) < len(estimates) else ""
    seconds = sum(one.seconds for one in left)
    return f"in all        {duration(seconds)} for {len(estimates)} runs one after the other{finished}"


def estimate(
    config: Config,
    method_name: str,
    partition_name: str,
    seed: int,
    started: float | None = None,
    overwrite: bool = False,
) -> Estimate:
    """Open a run's data, build its network, and time a few batches.

    Args:
        config: The project's configuration.
        method_name: An entry of `methods:` in params.yaml.
        partition_name: An entry of `partitions:`.
        seed: Seed of everything random.
        started: When this process started, by `time.perf_counter`, if the time to start includes its imports.
        overwrite: Whether the run may replace a finished one of other settings or data.

    Raises:
        PipelineError: As `run`.
    """
    job = Job(config, method_name, partition_name, seed)
    job.check()
    now = time.perf_counter()
    started, targets, planning_bytes = now if started is None else started, None, 0
    if job.guidance and planned.is_needed(config):
        planning_bytes = planned.library_bytes()  # which a run does without
        targets = planned.source(config, job.guidance, job.method_class.needs_labels, method_name)
    planning_seconds = time.perf_counter() - now
    runtime, schedule = config.params.runtime, job.schedule
    device = session.prepare_torch(runtime)
    data = run_data.on_disk(config, method_name, partition_name, seed, planned=targets)
    model, method = job.build(len(data.dataset.class_names), data.guidance_dim, len(data.clients), device)
    with_data = [client for client, own in enumerate(data.clients) if len(own)]
    chosen = [rounds.sample_clients(with_data, schedule, number + 1) for number in range(schedule.num_rounds)]
    num_workers = max(1, min(workers.resolve(runtime.workers, device), schedule.clients_per_round, len(with_data)))
    at_once = num_workers
    if device != "cpu":  # streams share one GPU: how much time they save is not known
        num_workers = 1
    server = method.init_server(session.weights_of(model))
    start_seconds = time.perf_counter() - started - planning_seconds + _time_partition(data)
    sizes = data.sizes
    where = placement.place(sizes, device)
    if where.images != "disk":
        start_seconds += _time_reading(data)
    trial = _try(method, data, server.weights, server.broadcast, schedule, device)
    kept = [getattr(sizes, part.name) for part in fields(sizes) if getattr(where, part.name) == "host"]
    on_device = [getattr(sizes, part.name) for part in fields(sizes) if getattr(where, part.name) == "device"]
    partition_bytes = 2 * data.label_counts.nbytes + _INDEX_BYTES * sum(map(len, data.parts))
    held_out = _of_busiest(len(data.held_out.labels), num_workers)
    of_clients = sum(_of_busiest(len(client), num_workers) for client in data.clients)  # one client after the other
    # After each round the held-out images, at the end for the clients' classes and for domains, and every client's. The
    # probes of methods without labels embed all clients after each round, and at the end for each of two classifiers.
    evaluated = (schedule.num_rounds + 2) * held_out + of_clients
    if not method.needs_labels:
        evaluated += 2 * held_out + (schedule.num_rounds + 2) * of_clients
    return Estimate(
        name=job.name,
        clients=len(data.clients),
        clients_with_data=len(with_data),
        participants=len(chosen[0]),
        rounds=schedule.num_rounds,
        samples=sum(map(len, data.clients)),
        steps=sum(_steps(len(data.clients[client]), schedule) for participants in chosen for client in participants),
        evaluated=evaluated,
        sizes=sizes,
        where=where,
        features_exist=targets is None,
        model=rounds.num_bytes(server.weights),
        down=rounds.num_bytes(server.weights) + rounds.num_bytes(server.broadcast),
        up=trial.up,
        server_state=sum(rounds.num_bytes(getattr(server, part.name)) for part in fields(server)),
        client_states=len({client for participants in chosen for client in participants}) * trial.state,
        free_space=estimates.free_space(config.state_dir),
        start_seconds=start_seconds,
        seconds_per_step=trial.seconds_per_step,
        seconds_per_image=_time_evaluation(model, data, device),
        workers=num_workers,
        device=device,
        process=estimates.of_process(
            device,
            sum(kept if device.startswith("cuda") else on_device) + partition_bytes - planning_bytes,
            sum(on_device) + (at_once - 1) * trial.device_bytes,
            _MORE_DESCRIPTORS + (3 * num_workers if num_workers > 1 else 0),
        ),
        in_place=_in_place(job, data, overwrite) if targets is None else "",
        is_finished=targets is None and records.is_complete(job.path, job.settings(data)),
    )


def _in_place(job: Job, data: FederatedData, overwrite: bool) -> str:
    """Return what a run would find in its folder, in words."""
    settings = job.settings(data)
    if records.is_complete(job.path, settings):
        return f"{job.path} holds this run, finished: a run keeps it"
    try:
        records.check_replaceable(job.path, settings)
    except ConfigError as error:
        return f"a run replaces {job.path}" if overwrite else f"a run would end at once: {error}"
    return ""


@dataclass(frozen=True)
class _Trial:
    """What one client's short training gave: seconds, and the bytes of its update and of its state."""

    seconds_per_step: float
    up: int
    state: int
    device_bytes: int  # of a GPU, while it trains


def _try(
    method: Method, data: FederatedData, weights: Weights, broadcast: Weights, schedule: Schedule, device: str
) -> _Trial:
    """Train twice on a few batches of the largest client: only the second time has it a state."""
    on_gpu = device.startswith("cuda")
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    client = _first_rows(data, _TIMED_BATCHES * schedule.batch_size).to(device)
    generator = seeding.torch_generator(schedule.seed, "estimate")
    batches = Batches(client, 1, schedule.batch_size, schedule.augmentation, generator, device)

    state = method.init_client(weights)
    up = 0

    def train() -> None:
        nonlocal state, up
        update, state, _ = method.client_update(weights, broadcast, state, batches, schedule.learning_rate)
        up = rounds.update_bytes(update)

    seconds = _timed(train, device)
    device_bytes = torch.cuda.max_memory_allocated(device) - before if on_gpu else 0
    return _Trial(seconds / _steps(len(client), schedule, epochs=1), up, rounds.num_bytes(state), device_bytes)


def _first_rows(data: FederatedData, count: int) -> ClientData:
    """Return the first `count` samples of the largest client, or all that it has."""
    largest = max(data.clients, key=len)
    first = torch.arange(min(len(largest), count))
    guidance = largest.guidance.select(first) if largest.guidance else None
    return ClientData(largest.images[first], largest.labels[first], guidance)


def _time_reading(data: FederatedData) -> float:
    """Return the seconds of reading the images and targets of all clients."""
    started = time.perf_counter()
    read = len(_first_rows(data, _TIMED_ROWS).to("cpu"))
    return (time.perf_counter() - started) * sum(map(len, data.clients)) / read


def _time_partition(data: FederatedData) -> float:
    """Return the seconds of writing partition.json, most of which are two numbers per client and class."""
    some = data.label_counts[:_TIMED_CLIENTS].tolist()
    started = time.perf_counter()
    json.dumps(some, indent=2)
    return 2 * (time.perf_counter() - started) * len(data.label_counts) / len(some)


def _time_evaluation(model: FLModel, data: FederatedData, device: str) -> float:
    """Return the seconds that one thread needs to evaluate an image."""
    some = data.held_out.images.split(_TIMED_IMAGES)[0].to("cpu")
    model.eval()
    return _timed(lambda: in_batches(model.embed, some, torch.device(device)), device) / len(some)


def _of_busiest(count: int, num_threads: int) -> int:
    """Return how many of so many images the busiest thread evaluates: a batch is not divided."""
    return min(count, CPU_BATCH * math.ceil(math.ceil(count / CPU_BATCH) / num_threads))


def _timed(action: Callable[[], object], device: str) -> float:
    """Return the seconds of the second call."""
    for _ in range(2):
        started = time.perf_counter()
        action()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _steps(count: int, schedule: Schedule, epochs: int | None = None) -> int:
    """Return the steps of a client with so many samples in one round."""
    return (schedule.local_epochs if epochs is None else epochs) * math.ceil(count / schedule.batch_size)
