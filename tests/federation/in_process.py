"""Flower's Grid without a network: the app itself answers in this process; every message is sent as bytes.

What runs is the app that runs on real nodes, called as Flower calls it; only SuperLink and SuperNodes are left out.
"""

import itertools
from unittest import mock

from flwr.app import Context, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as Bytes
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from pipeline.federation import members
from pipeline.federation.app import client_app, server_app


class InProcess(Grid):
    """Nodes by Flower's id, and what goes wrong with them.

    Attributes:
        nodes: id -> its --node-config.
        silent: (id, message type) of messages that are never answered.
        before: called with (id, message) before a node sees it; a node that it takes away is lost in mid-round.
        after: called with (id, reply) before the server sees it.
    """

    def __init__(self, run_config, nodes):
        self.run_config, self.nodes = run_config, dict(nodes)
        self.silent, self.before, self.after = set(), lambda *_: None, lambda *_: None
        self.log = []
        self._contexts, self._replies, self._numbers = {}, {}, itertools.count(1)

    def serve(self):
        """A run, as `flwr run` starts it; nodes answer at once, so the time that the server waits just passes."""
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        with mock.patch.object(members, "time", Clock()):
            server_app(self, Context(1, 1, {}, RecordDict(), self.run_config))

    def restart(self, node_id, new_id):
        """Restart a SuperNode: it gets a new id and an empty context."""
        self.nodes[new_id] = self.nodes.pop(node_id)

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._numbers))
            ids.append(message.metadata.message_id)
            reply = self._deliver(message)
            if reply is not None:
                self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids):
        return [self._replies.pop(number) for number in message_ids if number in self._replies]

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError

    def _deliver(self, message):
        node_id, kind = message.metadata.dst_node_id, message.metadata.message_type
        self.log.append((node_id, kind))
        received = _as_bytes(message)
        self.before(node_id, received)
        if node_id not in self.nodes or (node_id, kind) in self.silent:
            return None
        context = self._contexts.setdefault(
            node_id, Context(1, node_id, self.nodes[node_id], RecordDict(), self.run_config)
        )
        reply = _as_bytes(client_app(received, context))
        self.after(node_id, reply)
        return reply


class Clock:
    """Replaces the module `time`: sleeping takes no time."""

    def __init__(self):
        self._now = 0.0

    def monotonic(self):
        return self._now

    def sleep(self, seconds):
        self._now += seconds


def _as_bytes(message):
    return message_from_proto(Bytes.FromString(message_to_proto(message).SerializeToString()))
