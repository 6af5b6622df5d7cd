"""The server of the common basis: it asks all nodes for their moments, adds them, and sends the basis back."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp import Grid

from pipeline import feature_store, provenance
from pipeline.diffusion import representation
from pipeline.errors import ConfigError, PipelineError
from pipeline.feature_store import Basis
from pipeline.federation.members import Member, Members
from pipeline.federation.node import config_of, project_of
from pipeline.io import atomic
from stages.extract_features import basis as pca
from stages.extract_features.federated.moments import add_moments, add_pooled, pack_layers, read_moments, read_pooled

log = logging.getLogger(__name__)

T = TypeVar("T")


def serve(grid: Grid, run_config: Mapping[str, Any]) -> None:
    """Make the basis of all nodes that have joined, and save it here and on each of them.

    Raises:
        ConfigError: params.yaml names no file for the basis.
        PipelineError: Too few nodes joined or answered.
    """
    config = config_of(run_config, project_of(run_config))
    params = config.params.extract_features
    if params.basis == "auto":
        raise ConfigError("extract_features.basis is auto. Set it to a file for the common basis (data/basis.h5).")
    joined = Members(grid, config.params.train_fl.num_clients, config.params.federation)
    nodes = list(joined.wait(for_all=True).values())

    def ask(kind: str, content: RecordDict, read: Callable[[RecordDict], T]) -> dict[Member, T]:
        """Ask the remaining nodes; a node that fails is left out from then on."""
        nonlocal nodes
        answers = joined.ask(kind, content, read, nodes)
        nodes = list(answers)
        if len(nodes) < config.params.federation.min_clients:
            raise PipelineError(
                f"too few nodes are left ({len(nodes)}, federation.min_clients is "
                f"{config.params.federation.min_clients}). Fix the nodes and run again."
            )
        return answers

    ranges, channels = joined.agreed["layers"], joined.agreed["channels"]
    moments = ask("query.moments", RecordDict(), lambda content: read_moments(content, channels))
    total = add_moments(moments.values())
    dims = [stop - start for start, stop in ranges.values()]
    layers = {layer: representation.fit_basis(total[layer], d) for layer, d in zip(ranges, dims, strict=True)}
    pooled = ask("query.pooled", pack_layers(layers), lambda content: read_pooled(content, sum(dims)))
    basis, file = Basis(layers, *add_pooled(pooled.values())), config.path(params.basis)
    feature_store.write_basis_file(file, basis)
    contributors = [{"client": node.client_id, "name": node.name, "images": node.num_samples} for node in moments]
    manifest = {"sha256": provenance.file_sha256(file), "members": contributors, "agreed": joined.agreed}
    atomic.write_json(file.with_suffix(".json"), manifest)
    content = np.frombuffer(file.read_bytes(), np.uint8).copy()
    ask("query.basis", RecordDict({"file": ArrayRecord({"basis.h5": Array(content)})}), lambda content: None)
    for layer, share in pca.explained(basis).items():
        kept, channels = basis.layers[layer].components.shape
        log.info("basis of %s: %d of %d dims explain %.1f %%", layer, kept, channels, 100 * share)
    log.info("wrote %s from the images of %s", file, ", ".join(node.name for node in moments))
