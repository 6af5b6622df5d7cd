"""Exchanges with nodes: replies are read as they arrive, a few at a time; who has none is named with the reason."""

from unittest import mock

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from pipeline.errors import DataError, PipelineError
from pipeline.federation import members
from pipeline.settings.params import Federation
from tests.federation.in_process import Clock


class Nodes:
    """A part of Flower's Grid: node k joins as client k, and answers `seconds[k]` after it was asked."""

    def __init__(self, clock, count):
        self.clock, self.nodes, self.seconds = clock, list(range(1, count + 1)), {}
        self.answers = {}  # node id -> an Error instead of an answer
        self.pulled, self.lost, self._asked = [], set(), {}

    def get_node_ids(self):
        return self.nodes

    def push_messages(self, messages):
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = f"{message.metadata.message_type} {node}"
            self._asked[message.metadata.message_id] = message, self.clock.monotonic() + self.seconds.get(node, 0.0)
        return ["" if m.metadata.dst_node_id in self.lost else m.metadata.message_id for m in messages]

    def pull_messages(self, numbers):
        """As the SuperLink, hand an answer out once."""
        assert all(numbers)
        now = self.clock.monotonic()
        there = [number for number in numbers if number in self._asked and self._asked[number][1] <= now]
        self.pulled.append(len(there))
        return [self._answer(self._asked.pop(number)[0]) for number in there]

    def _answer(self, message):
        node = message.metadata.dst_node_id
        if message.metadata.message_type == members.JOIN:
            return Message(members.introduction(node, f"n{node}", 1, {}), reply_to=message)
        answer = self.answers.get(node) or RecordDict({"answer": ConfigRecord({"node": node})})
        return Message(answer, reply_to=message)


@pytest.fixture
def nodes():
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    with mock.patch.object(members, "time", Clock()) as clock:
        yield Nodes(clock, 40)


@pytest.fixture
def joined(nodes):
    params = {"min_clients": 40, "join_timeout": 9.0, "round_timeout": 60.0, "evaluation_clients": "all"}
    found = members.Members(nodes, 41, Federation(**params, differential_privacy=None))
    found.wait(for_all=True)
    return found


def value(member, reply):
    return reply.content.config_records["answer"]["node"]


def exchange(joined, read=value):
    answers, failures = joined.exchange(joined.messages("query.moments", RecordDict()), read)
    assert [member.client_id for member in answers] == sorted(member.client_id for member in answers)
    return {member.client_id: found for member, found in answers.items()}, {m.client_id: r for m, r in failures.items()}


def test_replies_are_pulled_a_few_at_a_time(nodes, joined):
    nodes.pulled.clear()
    answers, failures = exchange(joined)
    assert answers == {node: node for node in nodes.nodes} and not failures
    assert nodes.pulled == [16, 16, 8]


def test_replies_are_read_when_they_arrive(nodes, joined):
    nodes.seconds = {node: 50.0 - node for node in nodes.nodes}
    read, started = {}, nodes.clock.monotonic()
    answers, _ = exchange(joined, lambda member, reply: read.update({member.client_id: nodes.clock.monotonic()}))
    assert list(read) != list(answers) == nodes.nodes
    for client, at in read.items():  # a pause is a tenth of the time before it, at most 3 s
        assert 50.0 - client <= at - started <= min((50.0 - client) * 1.1, 53.0 - client) + 0.1


def test_who_does_not_answer_in_time_is_named(nodes, joined):
    nodes.seconds = {3: 59.9, 4: 60.1, 5: 1e9}
    started = nodes.clock.monotonic()
    answers, failures = exchange(joined)
    assert failures == dict.fromkeys((4, 5), "no answer within 60 s")
    assert sorted([*answers, 4, 5]) == nodes.nodes
    assert nodes.clock.monotonic() - started == pytest.approx(60)
    assert {4, 5} == set(joined.present()) - set(joined.answering())


def test_lost_request_is_not_waited_for(nodes, joined):
    nodes.lost = {7}
    started = nodes.clock.monotonic()
    answers, failures = exchange(joined)
    assert failures == {7: "the SuperLink did not take the request; its log says why"} and len(answers) == 39
    assert nodes.clock.monotonic() == started


def test_refusals_and_invalid_answers_have_their_reason(nodes, joined):
    nodes.answers = {2: Error(ErrorCode.NODE_UNAVAILABLE, "gone"), 3: Error(200, "client 3 (n3): no\ndata")}

    def read(member, reply):
        if member.client_id == 4:
            raise DataError("invalid")
        return value(member, reply)

    answers, failures = exchange(joined, read)
    assert failures == {2: "gone", 3: "no data", 4: "invalid"} and len(answers) == 37


def test_error_of_the_server_itself_ends_the_exchange(joined):
    def read(member, reply):
        raise PipelineError("the disk is full")

    with pytest.raises(PipelineError, match="the disk is full"):
        exchange(joined, read)
