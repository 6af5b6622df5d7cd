"""The server's view of the federation: which nodes have joined, which were rejected and why, and how to ask them.

Every connected node that is unknown is asked to join. It answers with its client id, its name and the settings that
must agree between nodes (class names, the properties of its features). Nothing waits for these answers: they are
collected at the next call, so a node may join late, or again after a restart. The majority of the first nodes
determines the agreed settings (ties go to the lowest client id). Nodes that differ are rejected by name.
"""

import collections
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from pipeline.errors import ConfigError, DataError, PipelineError, TrainingDiverged
from pipeline.settings.config import at, differing_keys
from pipeline.settings.params import Federation
from pipeline.text import printable

log = logging.getLogger(__name__)

T = TypeVar("T")

JOIN = "query.join"
_POLL_SECONDS = 0.5
_REPLIES_AT_ONCE = 16  # in memory: as many as are pulled from the SuperLink together
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 3.0  # seconds before the SuperLink is asked for replies again
_RETRY_SECONDS = 30.0  # before a rejected node is asked again: it loads its data each time
_NO_ANSWER = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)


@dataclass(frozen=True)
class Member:
    """A node that takes part."""

    node_id: int  # Flower's id of the node, which changes when it restarts
    client_id: int  # counted from 0
    name: str  # in messages
    num_samples: int  # its training images
    agreement: dict[str, Any] = field(compare=False)  # the settings that must agree between nodes, as JSON

    def __str__(self) -> str:
        """Return its name in messages."""
        return f"client {self.client_id} ({self.name})"


def introduction(client_id: int, name: str, num_samples: int, agreement: dict[str, Any]) -> RecordDict:
    """Return a node's answer to the request to join; see `Member`."""
    facts: dict[str, Any] = {"client-id": client_id, "name": name, "num-samples": num_samples}
    return RecordDict({"introduction": ConfigRecord({**facts, "agreement": json.dumps(agreement, sort_keys=True)})})


class Members:
    """The nodes of a run."""

    def __init__(self, grid: Grid, num_clients: int, params: Federation) -> None:
        """Start without members; `num_clients` is the limit of client ids, `params` says for whom to wait how long."""
        self._grid, self._num_clients, self._params = grid, num_clients, params
        self._asked: dict[str, tuple[int, float]] = {}  # message id -> node id, and when it was asked
        self._joined: dict[int, Member] = {}  # by node id
        self._node_of: dict[int, int] = {}  # client id -> node id, of those that have joined
        self._rejected: dict[int, str] = {}  # node id -> reason
        self._retry_at: dict[int, float] = {}  # node id -> when it may be asked again
        self._agreed: dict[str, Any] | None = None
        self._silent: set[int] = set()  # ids of the nodes that did not answer their last message

    @property
    def agreed(self) -> dict[str, Any]:
        """The settings on which all members agree; available once `wait` has returned."""
        assert self._agreed is not None
        return self._agreed

    def present(self) -> dict[int, Member]:
        """Update who has joined and left, and return the connected members by client id, ascending."""
        online = set(self._grid.get_node_ids())
        for node_id in [node_id for node_id in self._joined if node_id not in online]:
            log.warning("%s has left", self._remove(node_id))
        self._collect()
        self._ask_to_join(online)
        members = [member for member in self._joined.values() if self._agreed in (None, member.agreement)]
        return {member.client_id: member for member in sorted(members, key=lambda member: member.client_id)}

    def answering(self) -> dict[int, Member]:
        """Return the present members that answered their last message; all, if none did."""
        present = self.present()
        answering = {client: member for client, member in present.items() if member.node_id not in self._silent}
        return answering or present

    def wait(self, for_all: bool = False) -> dict[int, Member]:
        """Wait until `min_clients` members that agree are present, and return all that are, by client id.

        `for_all` waits for all clients, but after `join_timeout` `min_clients` are enough. Raise PipelineError, which
        names the rejected ones, if too few joined by then.
        """
        minimum, seconds = self._params.min_clients, self._params.join_timeout
        deadline = time.monotonic() + seconds
        while True:
            late, present = time.monotonic() > deadline, self.present()
            enough = max(self._num_clients, minimum) if for_all and not late else minimum
            if self._agreed is None and len(present) >= enough:
                present = self._agree(list(present.values()))
            if self._agreed is not None and len(present) >= enough:
                return present
            if late:
                rejected = "".join(f"; rejected: {reason}" for reason in self._rejected.values())
                raise PipelineError(
                    f"too few nodes ({len(present)} joined within {seconds:g} s, federation.min_clients is {minimum}"
                    f"{rejected}). Start the SuperNodes, or lower min_clients, and run again to resume."
                )
            time.sleep(_POLL_SECONDS)

    def messages(self, kind: str, content: RecordDict, members: Iterable[Member] | None = None) -> list[Message]:
        """Address `content` to each of `members`, or to all that are present; `kind` is Flower's message type."""
        recipients = self.present().values() if members is None else members
        ttl = self._params.round_timeout
        return [Message(content, dst_node_id=member.node_id, message_type=kind, ttl=ttl) for member in recipients]

    def ask(
        self, kind: str, content: RecordDict, read: Callable[[RecordDict], T], members: Iterable[Member] | None = None
    ) -> dict[Member, T]:
        """Send the same message of type `kind` to members, or to all that are present, and read their answers.

        `read` returns the value of an answer; see `exchange`. Return the values by member, ascending by client id,
        without the members that failed, which are logged by name.
        """
        messages = self.messages(kind, content, members)
        answers, failures = self.exchange(messages, lambda member, reply: read(reply.content))
        for member, reason in failures.items():
            log.warning("continuing %s without %s: %s", kind.removeprefix("query."), member, reason)
        return answers

    def exchange(
        self, messages: list[Message], read: Callable[[Member, Message], T]
    ) -> tuple[dict[Member, T], dict[Member, str]]:
        """Send messages to members, at most one to each, and read their replies as they arrive.

        `read` returns the value of a reply without error, or raises DataError or TrainingDiverged if the reply is
        invalid; another error ends the exchange. At most `_REPLIES_AT_ONCE` replies are in memory, if the values do not
        hold them. Return the values by member, and for each other recipient the reason why it has none; ascending by
        client id.
        """
        recipients = {message.metadata.dst_node_id for message in messages}
        by_node = {node_id: member for node_id, member in self._joined.items() if node_id in recipients}
        sent, timeout = self._push(messages), self._params.round_timeout
        failures = dict.fromkeys(by_node.values(), "the SuperLink did not take the request; its log says why")
        failures |= {by_node[node_id]: f"no answer within {timeout:g} s" for node_id in sent.values()}
        answers: dict[Member, T] = {}
        self._silent |= recipients
        for reply in self._replies(list(sent), timeout):
            if not (member := by_node.get(reply.metadata.src_node_id)):
                continue
            if not (reply.has_error() and reply.error.code in _NO_ANSWER):
                self._silent.discard(member.node_id)
            if reply.has_error():
                reason = _one_line(reply.error.reason) or f"error {reply.error.code}"
                failures[member] = reason.removeprefix(f"{member}: ")
                continue
            try:
                answers[member] = read(member, reply)
            except (DataError, TrainingDiverged) as error:
                failures[member] = str(error)
        ascending = sorted(by_node.values(), key=lambda member: member.client_id)
        return (
            {member: answers[member] for member in ascending if member in answers},
            {member: failures[member] for member in ascending if member not in answers},
        )

    def _push(self, messages: list[Message]) -> dict[str, int]:
        """Send messages, and return the number of the node by the id of each message that the SuperLink took."""
        taken = set(filter(None, self._grid.push_messages(messages)))  # other messages have "" or no id in it
        ids = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        return {message_id: node_id for message_id, node_id in ids.items() if message_id in taken}

    def _replies(self, waiting: list[str], timeout: float) -> Iterator[Message]:
        """Yield each reply to the messages of these ids once it has arrived, until all have or `timeout` has passed.

        Flower's `send_and_receive` would return all together. The SuperLink deletes a reply that it has handed out.
        """
        started = time.monotonic()
        while waiting:
            arrived = set()
            for first in range(0, len(waiting), _REPLIES_AT_ONCE):
                for reply in self._grid.pull_messages(waiting[first : first + _REPLIES_AT_ONCE]):
                    arrived.add(reply.metadata.reply_to_message_id)
                    yield reply
            waiting = [number for number in waiting if number not in arrived]
            waited = time.monotonic() - started
            if waited >= timeout:
                return
            if waiting:  # a round gets a tenth longer by it at most, or 0.1 s
                time.sleep(min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, waited / 10), timeout - waited))

    def _ask_to_join(self, online: set[int]) -> None:
        """Ask every connected node that has neither joined nor been asked already."""
        now, ttl = time.monotonic(), self._params.join_timeout
        self._asked = {key: (node, asked) for key, (node, asked) in self._asked.items() if now - asked < ttl}
        not_yet = {node for node, retry_at in self._retry_at.items() if now < retry_at}
        waiting = not_yet | {node for node, _ in self._asked.values()}
        unknown = sorted(online - self._joined.keys() - waiting)
        if unknown:
            messages = [Message(RecordDict(), dst_node_id=node, message_type=JOIN, ttl=ttl) for node in unknown]
            self._asked |= {message_id: (node, now) for message_id, node in self._push(messages).items()}

    def _collect(self) -> None:
        """Read the answers to requests to join that have arrived."""
        for reply in self._grid.pull_messages(list(self._asked)) if self._asked else ():
            self._asked.pop(reply.metadata.reply_to_message_id, None)
            node_id = reply.metadata.src_node_id
            if reply.has_error() and reply.error.code in _NO_ANSWER:
                continue  # slow, or gone: it is asked again
            self._retry_at[node_id] = time.monotonic() + _RETRY_SECONDS
            try:
                self._admit(_read_introduction(reply))
            except PipelineError as error:
                if self._rejected.get(node_id) != str(error):
                    log.warning("rejected: %s", error)
                self._rejected[node_id] = str(error)

    def _admit(self, member: Member) -> None:
        """Add a member; ConfigError if its client id is invalid or taken, it has no images, or its settings differ."""
        if not 0 <= member.client_id < self._num_clients:
            last = f"{self._num_clients - 1} (train_fl.num_clients - 1)"
            raise ConfigError(f"{member} has an invalid client-id. It must be from 0 to {last}.")
        if member.num_samples <= 0:
            raise ConfigError(f"{member} has {member.num_samples} images. It needs at least one.")
        if (node_id := self._node_of.get(member.client_id)) is not None:
            other = self._joined[node_id].name
            raise ConfigError(f"{member} has the client-id of {other}. Give each node its own.")
        if self._agreed is not None:
            _check_agreement(member, self._agreed)
        self._joined[member.node_id] = member
        self._node_of[member.client_id] = member.node_id
        self._rejected.pop(member.node_id, None)
        log.info("%s has joined with %d images", member, member.num_samples)

    def _remove(self, node_id: int) -> Member:
        member = self._joined.pop(node_id)
        del self._node_of[member.client_id]
        return member

    def _agree(self, members: list[Member]) -> dict[int, Member]:
        """Fix the agreed settings, reject the members that differ, and return the others by client id."""
        counts = collections.Counter(json.dumps(member.agreement, sort_keys=True) for member in members)
        self._agreed = json.loads(counts.most_common(1)[0][0])
        for member in members:
            try:
                _check_agreement(member, self._agreed)
            except PipelineError as error:
                self._remove(member.node_id)
                self._rejected[member.node_id] = str(error)
                log.warning("rejected: %s", error)
        return {member.client_id: member for member in members if member.node_id in self._joined}


def _read_introduction(reply: Message) -> Member:
    """Read a node's answer to the request to join; PipelineError if it refuses or its answer is invalid."""
    node_id = reply.metadata.src_node_id
    if reply.has_error():
        raise PipelineError(_one_line(reply.error.reason) or f"node {node_id} failed without an error message")
    try:
        facts = reply.content.config_records["introduction"]
        agreement = json.loads(str(facts["agreement"]))
        client_id, num_samples = int(str(facts["client-id"])), int(str(facts["num-samples"]))
        return Member(node_id, client_id, _one_line(str(facts["name"])), num_samples, agreement)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise PipelineError(
            f"node {node_id} sent an invalid introduction ({error!r}). Check that it runs the same version of Flower."
        ) from None


def _one_line(text: str | None) -> str:
    """Return a node's text on one line of at most a thousand printable characters."""
    return printable(" ".join((text or "")[:1000].split()))


def _check_agreement(member: Member, agreed: dict[str, Any]) -> None:
    if keys := differing_keys(member.agreement, agreed):
        theirs, ours = ({key: at(values, key, None) for key in keys[:3]} for values in (member.agreement, agreed))
        raise ConfigError(f"{member} has {theirs}, but the others have {ours}. Use the same on all nodes.")
