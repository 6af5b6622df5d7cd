"""A Flower Strategy for any method, and the engine that drives it.

The Strategy holds the method's server state between `configure_train` and `aggregate_train`, so Flower's wrapper for
central differential privacy, which adds noise to the aggregated weights, works around it as around any other. Clients
that do not reply in time, refuse, or send an invalid update are skipped and logged by name. If no client succeeds, the
run stops and can be resumed.

Methods add updates in the order of clients, whatever the order of their replies. So every reply is checked when it
arrives, and its tensors move to a file without a name (`pipeline.io.unnamed`) until the round ends: the server's memory
hardly grows with the number of participants. Wrappers get the replies' messages without their arrays.
"""

import collections
import time
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, Strategy

from pipeline.errors import DataError, PipelineError
from pipeline.federation.members import Member, Members
from pipeline.io import unnamed
from pipeline.settings.params import CentralPrivacy, Federation
from pipeline.text import size
from stages.train_fl import rounds
from stages.train_fl.client_states import ClientStates
from stages.train_fl.engines.flower.messages import TrainReply, TrainRequest, signature, to_record, to_tensors
from stages.train_fl.engines.flower.participation import Participation
from stages.train_fl.methods import Method, ServerState, Weights
from stages.train_fl.rounds import Progress, Round, Schedule
from stages.train_fl.session import Job

Reply = tuple[Message, TrainReply]

_LEAST_EXTRAS = 64_000_000
"""Bytes that the extras of a reply may have, whatever the size of the model."""


class MethodStrategy(Strategy):
    """A method of stages/train_fl/methods as a Flower Strategy."""

    def __init__(
        self,
        method: Method,
        start: Progress,
        schedule: Schedule,
        members: Members,
        params: Federation,
        run_key: str,
        folder: Path,
    ) -> None:
        """Continue from `start`; `run_key` names the run on the nodes, `folder` is on the disk for replies."""
        self.progress = start
        self.replies: dict[Member, TrainReply] = {}  # of the current round, ascending by client id
        self._method, self._schedule, self._members, self._params = method, schedule, members, params
        self._run_key, self._folder = run_key, folder

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample participants among the present members, as the local engine does, and address a request to each."""
        present = self._members.wait()
        server = replace(self.progress.server, weights=to_tensors(arrays, self.progress.server.weights))
        self.progress = replace(self.progress, server=server)
        broadcast = {"broadcast": to_record(server.broadcast)} if server.broadcast else {}
        messages = []
        for client in rounds.sample_clients(list(present), self._schedule, server_round):
            request = TrainRequest(self._run_key, server_round, self.progress.state_rounds.get(client, 0))
            record = ConfigRecord({**config, **request.record()})
            content = RecordDict({"weights": arrays, **broadcast, "request": record})
            messages += self._members.messages("train", content, [present[client]])
        return messages

    def read(self, member: Member, reply: Message) -> Reply:
        """Read and check a reply, and move its tensors to the disk; PipelineError if that is full.

        Images and steps weight an update, so they must agree with the introduction.
        """
        read = TrainReply.read(reply.content, self.progress.server.weights)
        steps = self._schedule.local_epochs * -(-member.num_samples // self._schedule.batch_size)
        if (read.update.num_samples, read.update.num_steps) != (member.num_samples, steps):
            raise DataError(
                f"invalid reply (trained on {read.update.num_samples} images in {read.update.num_steps} steps, but "
                f"joined with {member.num_samples} images, which make {steps} steps)"
            )
        weights, broadcast = self.progress.server.weights, self.progress.server.broadcast
        limit = max(_LEAST_EXTRAS, 4 * (rounds.num_bytes(weights) + rounds.num_bytes(broadcast)))
        if (found := rounds.num_bytes(read.update.extras)) > limit:  # they would fill the server's disk
            raise DataError(f"invalid reply (it has extras of {size(found)}, and {size(limit)} are the most)")
        reply.content.clear()
        weights, extras = (unnamed.on_disk(part, self._folder) for part in (read.update.weights, read.update.extras))
        return reply, replace(read, update=replace(read.update, weights=weights, extras=extras))

    def accept(self, replies: dict[Member, Reply]) -> tuple[list[Message], dict[Member, str]]:
        """Accept the replies whose extras fit the method and the other replies.

        Return the accepted messages, ascending by client id, and for each other member why its reply was rejected.
        """
        signatures = {
            member: (signature(read.update.extras), tuple(sorted(read.losses))) for member, (_, read) in replies.items()
        }
        usual = collections.Counter(signatures.values()).most_common(1)[0][0] if replies else None
        rejected = {}
        for member in replies:
            if signatures[member] != usual:
                rejected[member] = "the names, types or shapes of its extras differ from those of the other clients"
        alike = {member: read for member, (_, read) in replies.items() if member not in rejected}
        if together := self._misfit(list(alike.values())):
            alone = {member: self._misfit([read]) for member, read in alike.items()}
            misfits = {member: problem for member, problem in alone.items() if problem}
            rejected |= misfits or dict.fromkeys(alike, together)
        accepted = {member: reply for member, reply in replies.items() if member not in rejected}
        self.replies = {member: read for member, (_, read) in accepted.items()}
        return [message for message, _ in accepted.values()], rejected

    def _misfit(self, replies: list[TrainReply]) -> str:
        """Return why the method cannot use the replies' extras; "" if it can.

        Tries it, with the server's weights in place of the clients', and drops the result.
        """
        if not any(reply.update.extras for reply in replies):
            return ""
        before = self.progress.server
        try:
            after, _ = self._method.server_update(
                before, [replace(reply.update, weights=before.weights) for reply in replies]
            )
        except Exception as error:  # untrusted tensors in a method's arithmetic: any exception means invalid
            return f"its extras do not fit the method ({error!r})"
        parts = [(getattr(after, part), getattr(before, part)) for part in ("weights", "broadcast")]
        fits = all(not old or signature(new) == signature(old) for new, old in parts)
        return "" if fits else "its extras do not fit the method (they would change the model's tensors)"

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Apply the method's server_update to the accepted replies, in the order of clients."""
        updates = [read.update for read in self.replies.values()]
        if self._params.differential_privacy is not None:  # a large node must not move the mean more than others
            updates = [replace(update, num_samples=1) for update in updates]
        server, _ = self._method.server_update(self.progress.server, updates)
        kept = {member.client_id: read.keeps_state for member, read in self.replies.items()}
        self.progress = self.progress.after(server, kept)
        return to_record(server.weights), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no messages: a run's evaluator scores the global model."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing, as there are no replies."""
        return None

    def summary(self) -> None:
        """Log nothing."""


class FlowerEngine:
    """The rounds of a method over nodes: a `session.Engine`."""

    name = "flower"
    device = "cpu"
    holds_states = False
    checkpoint_every = 1

    def __init__(self, job: Job, method: Method, members: Members, grid: Grid, run_key: str) -> None:
        """Run `job` over the `members`; `run_key` names the run on the nodes."""
        self._job, self._method, self._members, self._grid, self._run_key = job, method, members, grid, run_key
        self.participation: Participation | None = None

    def begin(self, weights: Weights) -> Progress:
        """Return the state before the first round, with these initial weights."""
        return rounds.begin(self._method, {name: value.cpu() for name, value in weights.items()})

    def rounds(self, start: Progress, states: ClientStates | None) -> Generator[Round, None, None]:
        """Run all rounds after `start`; PipelineError if too few nodes are present or none sent a valid update."""
        job, method = self._job, self._method
        params, schedule = job.config.params.federation, job.schedule
        folder = job.config.state_dir
        core = MethodStrategy(method, start, schedule, self._members, params, self._run_key, folder)
        strategy: Strategy = core
        if isinstance(private := params.differential_privacy, CentralPrivacy):
            strategy = DifferentialPrivacyClientSideFixedClipping(
                core, private.noise_multiplier, private.clipping_norm, 1
            )
        self.participation = Participation(job.path, start.number)
        for number in range(start.number + 1, schedule.num_rounds + 1):
            started, sent = time.perf_counter(), core.progress.server
            self._train(core, strategy, self.participation, number)
            done = _round(core, sent, method, schedule, time.perf_counter() - started)
            core.replies = {}  # ends their files before the model is evaluated
            yield done

    def _train(self, core: MethodStrategy, strategy: Strategy, participation: Participation, number: int) -> None:
        """Run one round of the strategy; PipelineError if no node sent a valid update or the disk is full."""
        arrays = to_record(core.progress.server.weights)
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), self._grid))
        replies, failures = self._members.exchange(messages, core.read)
        accepted, rejected = core.accept(replies)
        participation.add(number, core.replies, failures | rejected)
        if not accepted:
            raise PipelineError(
                f"no node sent a valid update in round {number} ({participation.outcomes()}). Fix the nodes and run "
                "again to resume; if noise for differential privacy made the model useless, start over with less "
                "noise."
            )
        if isinstance(strategy, DifferentialPrivacyClientSideFixedClipping):
            strategy.num_sampled_clients = len(accepted)  # noise for the mean of those that replied
        new, _ = strategy.aggregate_train(number, accepted)
        assert new is not None
        server = replace(core.progress.server, weights=to_tensors(new, core.progress.server.weights))
        core.progress = replace(core.progress, server=server)


def _round(core: MethodStrategy, sent: ServerState, method: Method, schedule: Schedule, seconds: float) -> Round:
    """Describe the round that the strategy has just finished; `sent` is the server's state before it."""
    replies = list(core.replies.values())
    updates = [reply.update for reply in replies]
    sizes = [update.num_samples for update in updates]
    return Round(
        progress=core.progress,
        weights=method.reported_weights(core.progress.server),
        participants=[member.client_id for member in core.replies],
        num_samples=sum(sizes) * schedule.local_epochs,
        train_metrics=rounds.mean_metrics([reply.losses for reply in replies], sizes),
        bytes_down=len(updates) * (rounds.num_bytes(sent.weights) + rounds.num_bytes(sent.broadcast)),
        bytes_up=sum(map(rounds.update_bytes, updates)),
        load_seconds=max(reply.load_seconds for reply in replies),
        train_seconds=seconds,
        aggregate_seconds=0.0,  # included in train_seconds
    )
