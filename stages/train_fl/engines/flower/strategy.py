"""One Flower Strategy that carries any method, and the rounds that drive it.

The Strategy holds the method's server state between `configure_train` and `aggregate_train`, so Flower's wrappers, as
those for differential privacy, go around it as around any other. `rounds` is the counterpart of the local engine's
`run`: it yields after every round, and goes on from any progress. A client that does not answer, answers too late,
refuses or sends what is no update is left out of the round, by name; the round is the others'. Nobody: the run stops,
and goes on from there when it is started again.
"""

import collections
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from pipeline.errors import PipelineError
from pipeline.federation.members import Member, Members, reason_of
from pipeline.settings.params import Federation
from stages.train_fl import rounds
from stages.train_fl.engines.flower.messages import Order, Work, form, to_record, to_tensors
from stages.train_fl.methods import ClientState, ClientUpdate, Method
from stages.train_fl.rounds import Progress, Round, Schedule

log = logging.getLogger(__name__)

Row = dict[str, Any]


class MethodStrategy(Strategy):
    """Any method of stages/train_fl/methods as a Flower Strategy."""

    def __init__(
        self, method: Method, start: Progress, schedule: Schedule, members: Members, params: Federation, key: str
    ) -> None:
        """Goes on from `start`, whose client states are the rounds of their updates; `key` is the run's."""
        self.progress = start
        self.account: list[Row] = []
        self.method, self.schedule = method, schedule
        self._members, self._params, self._key = members, params, key
        self._sampled: dict[int, Member] = {}  # by Flower's id
        self._done: dict[int, Work] = {}  # by client id

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Orders for the round's participants, drawn as in the local engine, among the members that are present."""
        present = self._members.wait(self._params.min_clients, self._params.join_timeout)
        server = replace(self.progress.server, weights=to_tensors(arrays, self.progress.server.weights))
        self.progress = replace(self.progress, server=server)
        chosen = rounds.sample_clients(list(present), self.schedule, server_round)
        self._sampled = {present[client].node_id: present[client] for client in chosen}
        self._done = {}
        broadcast = {"broadcast": to_record(server.broadcast)} if server.broadcast else {}
        return [
            Message(
                RecordDict({"weights": arrays, **broadcast, "order": ConfigRecord({**config, **self._order(member)})}),
                dst_node_id=node_id,
                message_type="train",
                group_id=str(server_round),
                ttl=self._params.round_timeout,
            )
            for node_id, member in self._sampled.items()
        ]

    def add_sum(self, number: int, works: dict[int, Work], problems: dict[int, str]) -> ArrayRecord | None:
        """Takes a round whose updates were added up on the way: `aggregate_train` of their mean.

        Args:
            number: the round.
            works: by Flower's id, each with the mean of all updates as its own.
            problems: by Flower's id, why a node failed.

        Returns:
            The new global weights; None if there is no mean.
        """
        self._done = {self._sampled[node_id].client_id: work for node_id, work in works.items()}
        silent = (
            f"no answer in {self._params.round_timeout:g} s" if works else "too few were left for secure aggregation"
        )
        for node_id, member in self._sampled.items():
            lost = problems.get(node_id, silent).removeprefix(f"{member}: ")
            self._enter(member, "" if node_id in works else lost)
        return self._update(number, {client: work.update for client, work in self._done.items()})

    def take(self, replies: Iterable[Message]) -> list[Message]:
        """Those answers that are updates; all else is entered in the account, and said aloud."""
        outcomes = dict.fromkeys(self._sampled, f"no answer in {self._params.round_timeout:g} s")
        read: dict[int, tuple[Message, Work]] = {}
        for reply in replies:
            node_id = reply.metadata.src_node_id
            if node_id not in self._sampled:
                continue
            try:
                read[node_id] = reply, self._read(reply, self._sampled[node_id])
            except PipelineError as error:
                outcomes[node_id] = str(error)
        in_order = sorted(read.items(), key=lambda item: self._sampled[item[0]].client_id)
        forms = collections.Counter(_form_of(work) for _, (_, work) in in_order)
        for node_id, (_, work) in in_order:
            outcomes[node_id] = self._misfit(work, forms)
        self._done = {self._sampled[node_id].client_id: work for node_id, (_, work) in in_order}
        for node_id, problem in outcomes.items():
            self._enter(self._sampled[node_id], problem)
            if problem:
                self._done.pop(self._sampled[node_id].client_id, None)
        return [reply for node_id, (reply, _) in in_order if not outcomes[node_id]]

    def _read(self, reply: Message, member: Member) -> Work:
        """A node's work.

        Raises:
            PipelineError: it refuses, or says what cannot be.
        """
        if reply.has_error():
            raise PipelineError(reason_of(reply, member))
        work = Work.read(reply.content, self.progress.server.weights)
        self._check_amount(work, member)
        return work

    def _check_amount(self, work: Work, member: Member) -> None:
        """Images and steps weigh an update: they are those that it joined with, and what these come to."""
        steps = self.schedule.local_epochs * -(-member.num_samples // self.schedule.batch_size)
        if (work.update.num_samples, work.update.num_steps) != (member.num_samples, steps):
            raise PipelineError(
                f"it trained on {work.update.num_samples} images in {work.update.num_steps} steps; it joined with "
                f"{member.num_samples}, which make {steps}"
            )

    def _misfit(self, work: Work, forms: "collections.Counter[Any]") -> str:
        """What is wrong with what a client sent besides its weights, or nothing: it has others' form, and is of use."""
        if _form_of(work) != forms.most_common(1)[0][0]:
            return "what it sent besides its weights has another form than the others'"
        try:
            tried, _ = self.method.server_update(self.progress.server, [work.update])
        except Exception as error:  # tensors from elsewhere in a method's arithmetic: whatever it raises
            return f"what it sent does not fit the method ({error!r})"
        parts = [(getattr(tried, part), getattr(self.progress.server, part)) for part in ("weights", "broadcast")]
        fits = all(not old or form(new) == form(old) for new, old in parts)
        return "" if fits else "what it sent does not fit the method: its update would change the model's form"

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The method's server_update of the answers, in the order of clients; None if there are none."""
        updates = {}
        for reply in replies:
            client = self._sampled[reply.metadata.src_node_id].client_id
            weights = to_tensors(reply.content.array_records["weights"], self.progress.server.weights)
            updates[client] = replace(self._done[client].update, weights=weights)
        return self._update(server_round, updates), None

    def _update(self, number: int, updates: dict[int, ClientUpdate]) -> ArrayRecord | None:
        if not updates:
            return None
        if self._params.differential_privacy is not None:  # a large node must not move the mean by more than others
            updates = {client: replace(update, num_samples=1) for client, update in updates.items()}
        server, _ = self.method.server_update(self.progress.server, [updates[client] for client in sorted(updates)])
        clients = list(self.progress.clients)
        for client in updates:
            clients[client] = {"round": torch.tensor(number)} if self._done[client].keeps_state else {}
        self.progress = Progress(number, server, clients)
        return to_record(server.weights)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Asks every member that is present to judge the global model."""
        return [
            Message(
                RecordDict({"weights": arrays}),
                dst_node_id=member.node_id,
                message_type="evaluate",
                group_id=str(server_round),
                ttl=self._params.round_timeout,
            )
            for member in self._members.present().values()
        ]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Accuracy and loss over all nodes' held-out images; None if nobody answered. Who does not is named."""
        scores = []
        for reply in replies:
            try:
                scores.append(_scores(reply))
            except PipelineError as error:
                name = self._members.name_of(reply.metadata.src_node_id)
                log.warning("round %d is judged without %s: %s", server_round, name, error)
        if not scores:
            return None
        images = [score["num-images"] for score in scores]
        means: dict[str, Any] = {
            name: float(np.average([score[name] for score in scores], weights=images)) for name in ("accuracy", "loss")
        }
        return MetricRecord(means)

    def farewell(self) -> list[Message]:
        """Tells every member that is present to drop what it kept for the run."""
        order = RecordDict({"order": Order(self._key, self.progress.number, 0).record()})
        return [
            Message(order, dst_node_id=member.node_id, message_type="query.forget", ttl=self._params.round_timeout)
            for member in self._members.present().values()
        ]

    def summary(self) -> None:
        """Says what is about to run."""
        log.info("%s, %d rounds", type(self.method).__name__, self.schedule.num_rounds)

    @property
    def work(self) -> dict[int, Work]:
        """What the round's participants did, by client id."""
        return dict(sorted(self._done.items()))

    def _order(self, member: Member) -> ConfigRecord:
        state: ClientState = self.progress.clients[member.client_id]
        state_of = int(state["round"]) if state else 0
        return Order(self._key, self.progress.number + 1, state_of).record()

    def _enter(self, member: Member, problem: str) -> None:
        work = self._done.get(member.client_id)
        if problem:
            log.warning("round %d goes on without %s: %s", self.progress.number + 1, member, problem)
        self.account.append(
            {
                "round": self.progress.number + 1,
                "client": member.client_id,
                "name": member.name,
                "outcome": problem or "trained",
                "num_samples": work.update.num_samples if work else 0,
                "train_seconds": work.train_seconds if work else None,
            }
        )


def _form_of(work: Work) -> tuple[Any, ...]:
    """The names, types and shapes of what a method sends besides weights, and the names of its losses."""
    return form(work.update.extras), tuple(sorted(work.losses))


def _scores(reply: Message) -> dict[str, float]:
    """A node's judgement.

    Raises:
        PipelineError: it is none.
    """
    if reply.has_error():
        raise PipelineError(reason_of(reply))
    try:
        record = reply.content.metric_records["scores"]
        found = {name: float(record[name]) for name in ("accuracy", "loss", "num-images")}  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise PipelineError(f"its answer is no judgement ({error!r})") from None
    if not (0 <= found["accuracy"] <= 1 and np.isfinite(found["loss"]) and 0 < found["num-images"] < 2**40):
        raise PipelineError(f"its judgement cannot be: {found}")
    return found


class Exchange(Protocol):
    """Sends the orders of a round and gathers what comes of them."""

    def __call__(self, number: int, arrays: ArrayRecord) -> ArrayRecord | None:
        """The new global weights; None if nobody answered."""


def plain_exchange(strategy: Strategy, core: MethodStrategy, grid: Grid, timeout: float) -> Exchange:
    """Every node's update in the clear; `strategy` is `core`, or a wrapper around it."""

    def exchange(number: int, arrays: ArrayRecord) -> ArrayRecord | None:
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        good = core.take(grid.send_and_receive(messages, timeout=timeout))
        if hasattr(strategy, "num_sampled_clients"):  # noise for the mean of those who answered
            strategy.num_sampled_clients = max(1, len(good))
        return strategy.aggregate_train(number, good)[0] if good else None

    return exchange


def run(core: MethodStrategy, exchange: Exchange, tell: Callable[[list[Row]], None]) -> Iterator[Round]:
    """All rounds that are left.

    Args:
        core: the strategy, with the progress to go on from.
        exchange: how a round's weights and updates travel.
        tell: gets the account of who took part, after every exchange.

    Raises:
        PipelineError: nobody took part in a round, or too few nodes are there.
    """
    arrays = to_record(core.progress.server.weights)
    for number in range(core.progress.number + 1, core.schedule.num_rounds + 1):
        started = time.perf_counter()
        sent = core.progress.server
        new = exchange(number, arrays)
        tell(core.account)
        if new is None:
            raise PipelineError(
                f"round {number}: no node sent an update of use ({_outcomes(core.account, number)}): mend them and run "
                "again, it goes on from there; a model drowned in differential privacy's noise must begin anew"
            )
        arrays, work = new, core.work
        server = replace(core.progress.server, weights=to_tensors(new, core.progress.server.weights))
        core.progress = replace(core.progress, server=server)
        yield Round(
            progress=core.progress,
            weights=core.method.reported_weights(server),
            bytes_down=len(work) * (rounds.num_bytes(sent.weights) + rounds.num_bytes(sent.broadcast)),
            train_seconds=time.perf_counter() - started,
            aggregate_seconds=0.0,  # within the exchange
            **_of_work(work, core.schedule.local_epochs),
        )


def _of_work(work: dict[int, Work], epochs: int) -> dict[str, Any]:
    """What a Round says of its participants."""
    updates = [done.update for done in work.values()]
    sizes = [update.num_samples for update in updates]
    names = next(iter(work.values())).losses
    return dict(
        participants=list(work),
        num_samples=sum(sizes) * epochs,
        num_steps=sum(update.num_steps for update in updates),
        train_metrics={
            name: float(np.average([done.losses[name] for done in work.values()], weights=sizes)) for name in names
        },
        bytes_up=sum(map(rounds.update_bytes, updates)),
        load_seconds=max(done.load_seconds for done in work.values()),
    )


def _outcomes(account: list[Row], number: int) -> str:
    return "; ".join(f"client {row['client']}: {row['outcome']}" for row in account if row["round"] == number)
