"""The server's view of the federation: who has joined, who was refused and why, who has left.

Every node that is connected and unknown is asked to join; it answers with its client id, its name and what it must
agree on with the others (class names, what its features are). Asking never holds up a round: answers are collected
when the next one begins, so a node may join late, or again after a restart. What most of the first nodes agree on
stands for the whole run (the lowest client's among equals); a node that differs is refused by name, the others go on.
"""

import collections
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from pipeline.errors import PipelineError
from pipeline.settings.config import at, differing_keys
from pipeline.text import printable

log = logging.getLogger(__name__)

JOIN = "query.join"
_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 30.0  # before a node that was refused is asked again: it loads its data each time
_NO_ANSWER = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)


@dataclass(frozen=True)
class Member:
    """A node that takes part: Flower's id of it, which changes at a restart, and what it said of itself."""

    node_id: int
    client_id: int
    name: str
    num_samples: int
    agreement: dict[str, Any]

    def __str__(self) -> str:
        """As messages name it."""
        return f"client {self.client_id} ({self.name})"


def introduction(client_id: int, name: str, num_samples: int, agreement: dict[str, Any]) -> RecordDict:
    """A node's answer to being asked to join; `agreement` is what may not differ between nodes, as JSON."""
    facts = {
        "client-id": client_id,
        "name": name,
        "num-samples": num_samples,
        "agreement": json.dumps(agreement, sort_keys=True),
    }
    return RecordDict({"introduction": ConfigRecord(facts)})  # type: ignore[arg-type]


class Members:
    """Who takes part."""

    def __init__(
        self, grid: Grid, num_clients: int, answer_within: float, told: Callable[[str], None] = log.warning
    ) -> None:
        """Nobody yet.

        Args:
            grid: Flower's connection to the nodes.
            num_clients: client ids are below it.
            answer_within: seconds that a node has to answer.
            told: gets every change in words.
        """
        self._grid, self._num_clients, self._ttl, self._told = grid, num_clients, answer_within, told
        self._asked: dict[str, tuple[int, float]] = {}  # message id -> node, and when it was asked
        self._joined: dict[int, Member] = {}  # by node id
        self._refused: dict[int, str] = {}  # by node id
        self._not_before: dict[int, float] = {}  # node id -> when it may be asked again
        self._agreed: dict[str, Any] | None = None

    @property
    def agreed(self) -> dict[str, Any]:
        """What all members agree on; known once `wait` has returned."""
        assert self._agreed is not None
        return self._agreed

    def present(self) -> dict[int, Member]:
        """The members that are connected, by client id, ascending, after collecting who came and who left."""
        online = set(self._grid.get_node_ids())
        for node_id in [node_id for node_id in self._joined if node_id not in online]:
            self._told(f"{self._joined.pop(node_id)} has left")
        self._collect()
        self._ask(online)
        members = [member for member in self._joined.values() if self._agreed in (None, member.agreement)]
        return {member.client_id: member for member in sorted(members, key=lambda member: member.client_id)}

    def wait(self, minimum: int, seconds: float, wanted: int | None = None) -> dict[int, Member]:
        """Waits for members that agree; they, by client id.

        Args:
            minimum: how many there must be.
            seconds: how long to wait.
            wanted: how many are waited for before the minimum is enough; None: the minimum.

        Raises:
            PipelineError: they have not come in time; names who was refused.
        """
        deadline = time.monotonic() + seconds
        while True:
            late, present = time.monotonic() > deadline, self.present()
            enough = minimum if wanted is None or late else max(wanted, minimum)
            if self._agreed is None and len(present) >= enough:
                present = self._agree(list(present.values()))
            if self._agreed is not None and len(present) >= enough:
                return present
            if late:
                refused = "".join(f"; refused: {reason}" for reason in self._refused.values())
                raise PipelineError(
                    f"{len(present)} nodes have joined in {seconds:g} s, federation.min_clients = {minimum}{refused}: "
                    "start the SuperNodes, or lower it, and run again; it goes on from where it was"
                )
            time.sleep(_POLL_SECONDS)

    def name_of(self, node_id: int) -> str:
        """A node as messages name it."""
        return str(self._joined.get(node_id, f"node {node_id}"))

    def _ask(self, online: set[int]) -> None:
        """Asks everyone who is connected and neither joined nor asked already."""
        now = time.monotonic()
        self._asked = {key: (node, at) for key, (node, at) in self._asked.items() if now - at < self._ttl}
        waiting = {node for node, _ in self._asked.values()} | {
            node for node, at in self._not_before.items() if now < at
        }
        unknown = online - self._joined.keys() - waiting
        messages = [
            Message(RecordDict(), dst_node_id=node_id, message_type=JOIN, ttl=self._ttl) for node_id in sorted(unknown)
        ]
        if messages:
            keys = self._grid.push_messages(messages)
            self._asked |= {
                key: (message.metadata.dst_node_id, now) for key, message in zip(keys, messages, strict=True)
            }

    def _collect(self) -> None:
        for reply in self._grid.pull_messages(list(self._asked)) if self._asked else ():
            self._asked.pop(reply.metadata.reply_to_message_id, None)
            node_id = reply.metadata.src_node_id
            if reply.has_error() and reply.error.code in _NO_ANSWER:
                continue  # slow, or gone: it is asked again
            self._not_before[node_id] = time.monotonic() + _PATIENCE_SECONDS
            try:
                self._admit(_read(reply))
            except PipelineError as error:
                if self._refused.get(node_id) != str(error):
                    self._told(f"refused: {error}")
                self._refused[node_id] = str(error)

    def _admit(self, member: Member) -> None:
        """Takes a node in, unless it differs or its place is taken.

        Raises:
            PipelineError: it is not taken in.
        """
        if not 0 <= member.client_id < self._num_clients or member.num_samples <= 0:
            raise PipelineError(
                f"{member} has {member.num_samples} images: there must be some, and a client-id is from 0 to "
                f"{self._num_clients - 1}, one below train_fl.num_clients"
            )
        for other in self._joined.values():
            if other.client_id == member.client_id:
                raise PipelineError(
                    f"{member}: client-id {member.client_id} is {other.name}'s already: give each node its own"
                )
        if self._agreed is not None:
            _check_agreement(member, self._agreed)
        self._joined[member.node_id] = member
        self._refused.pop(member.node_id, None)
        self._told(f"{member} has joined with {member.num_samples} images")

    def _agree(self, members: list[Member]) -> dict[int, Member]:
        """Takes what most agree on, the lowest client's among equals; refuses the others."""
        counts = collections.Counter(json.dumps(member.agreement, sort_keys=True) for member in members)
        self._agreed = json.loads(counts.most_common(1)[0][0])
        for member in members:
            try:
                _check_agreement(member, self._agreed)
            except PipelineError as error:
                del self._joined[member.node_id]
                self._refused[member.node_id] = str(error)
                self._told(f"refused: {error}")
        return {member.client_id: member for member in members if member.node_id in self._joined}


def _read(reply: Message) -> Member:
    """A node's introduction.

    Raises:
        PipelineError: it refuses, or its answer is not one.
    """
    node_id = reply.metadata.src_node_id
    if reply.has_error():
        raise PipelineError(_said(reply.error.reason) or f"node {node_id} failed without a word")
    try:
        facts = reply.content.config_records["introduction"]
        agreement = json.loads(str(facts["agreement"]))
        client_id, num_samples = int(str(facts["client-id"])), int(str(facts["num-samples"]))
        return Member(node_id, client_id, _said(str(facts["name"])), num_samples, agreement)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise PipelineError(f"node {node_id} gave no introduction ({error!r}): does it run another version?") from None


def reason_of(reply: Message, member: Member | None = None) -> str:
    """Why a node did not do what was asked, from its reply with an error; without its own name before it, if known."""
    reason = _said(reply.error.reason) or f"error {reply.error.code}"
    return reason.removeprefix(f"{member}: ")


def _said(text: str | None) -> str:
    """What a node says, on one line of a terminal or a log, of a thousand letters at most."""
    return printable(" ".join((text or "")[:1000].split()))


def _check_agreement(member: Member, agreed: dict[str, Any]) -> None:
    if keys := differing_keys(member.agreement, agreed):
        theirs = {key: at(member.agreement, key, None) for key in keys[:3]}
        ours = {key: at(agreed, key, None) for key in keys[:3]}
        raise PipelineError(f"{member} has {theirs}, the others have {ours}: it cannot train with them")
