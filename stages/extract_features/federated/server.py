"""The server of the common basis: asks all nodes for their moments, adds them, and sends the basis back."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from pipeline import feature_store, provenance
from pipeline.diffusion import representation
from pipeline.errors import PipelineError
from pipeline.feature_store import Basis
from pipeline.federation.members import Member, Members, reason_of
from pipeline.federation.node import config_of, project_of
from pipeline.io import atomic
from pipeline.settings.params import Federation
from stages.extract_features import basis as pca
from stages.extract_features.federated.moments import (
    add_moments,
    add_pooled,
    pack_layers,
    read_moments,
    read_pooled,
)

log = logging.getLogger(__name__)

T = TypeVar("T")


def serve(grid: Grid, run_config: Mapping[str, Any]) -> None:
    """Makes the basis of all nodes that are there, keeps it here and at each of them.

    Args:
        grid: Flower's connection to the nodes.
        run_config: the server's project folder, and `set`.

    Raises:
        PipelineError: too few nodes come or answer, or params.yaml names no file for the basis.
    """
    config = config_of(run_config, project_of(run_config))
    params = config.params.extract_features
    if params.basis == "auto":
        raise PipelineError("extract_features.basis is auto: name the file to keep the common basis in, data/basis.h5")
    nodes = _Nodes(grid, config.params.federation, config.params.train_fl.num_clients)
    agreed = nodes.agreed
    ranges, channels = agreed["layers"], agreed["channels"]
    total = add_moments(nodes.ask("query.moments", RecordDict(), lambda content: read_moments(content, channels)))
    members = [{"client": m.client_id, "name": m.name, "images": m.num_samples} for m in nodes.members]
    dims = [stop - start for start, stop in ranges.values()]
    layers = {layer: representation.fit_basis(total[layer], d) for layer, d in zip(ranges, dims, strict=True)}
    pooled = nodes.ask("query.pooled", pack_layers(layers), lambda content: read_pooled(content, sum(dims)))
    basis, file = Basis(layers, *add_pooled(pooled)), config.path(params.basis)
    feature_store.write_basis_file(file, basis)
    made = {"sha256": provenance.file_sha256(file), "members": members, "agreed": agreed}
    atomic.write_json(file.with_suffix(".json"), made)
    content = np.frombuffer(file.read_bytes(), np.uint8).copy()
    nodes.ask("query.basis", RecordDict({"file": ArrayRecord({"basis.h5": Array(content)})}), lambda content: None)
    for layer, share in pca.explained(basis).items():
        log.info("basis of %s: %d dims explain %.1f %%", layer, len(basis.layers[layer].components), 100 * share)
    log.info("%s, of the images of %s", file, ", ".join(str(member["name"]) for member in members))


class _Nodes:
    """Those that make the basis together; one that fails is left out from then on, by name."""

    def __init__(self, grid: Grid, params: Federation, num_clients: int) -> None:
        self._grid, self._params = grid, params
        joined = Members(grid, num_clients, params.join_timeout)
        self._present = joined.wait(params.min_clients, params.join_timeout, wanted=num_clients)
        self.agreed = joined.agreed

    @property
    def members(self) -> list[Member]:
        """Ascending by client id."""
        return list(self._present.values())

    def ask(self, question: str, content: RecordDict, read: Callable[[RecordDict], T]) -> list[T]:
        """Asks all; their answers, in the order of clients.

        Args:
            question: the message's type.
            content: what it holds.
            read: makes of an answer what it says, or raises PipelineError.

        Raises:
            PipelineError: too few are left.
        """
        messages = [
            Message(content, dst_node_id=member.node_id, message_type=question, ttl=self._params.round_timeout)
            for member in self.members
        ]
        answers: dict[int, T] = {}
        failed: dict[int, str] = {}
        for reply in self._grid.send_and_receive(messages, timeout=self._params.round_timeout):
            node_id = reply.metadata.src_node_id
            try:
                if reply.has_error():
                    raise PipelineError(reason_of(reply))
                answers[node_id] = read(reply.content)
            except PipelineError as error:
                failed[node_id] = str(error)
        for member in self.members:
            if member.node_id not in answers:
                reason = failed.get(member.node_id, f"no answer in {self._params.round_timeout:g} s")
                log.warning("going on without %s: %s", member, reason.removeprefix(f"{member}: "))
                del self._present[member.client_id]
        if len(self._present) < self._params.min_clients:
            raise PipelineError(
                f"{len(self._present)} nodes are left, federation.min_clients = {self._params.min_clients}: mend them "
                "and run again"
            )
        return [answers[member.node_id] for member in self.members]
