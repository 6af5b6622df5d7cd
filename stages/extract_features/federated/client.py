"""A node's part of the common basis: it runs the frozen model on its own images and sends moments."""

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict

from pipeline import feature_store
from pipeline.diffusion import backbones
from pipeline.diffusion.prompted_model import Inputs
from pipeline.errors import ConfigError
from pipeline.federation import members
from pipeline.federation.node import Node, config_of, node_of
from pipeline.io import atomic
from pipeline.progress import progress_bar
from pipeline.settings.config import Config
from stages.extract_features import basis as pca
from stages.extract_features import plan as planning
from stages.extract_features.extraction import Extraction
from stages.extract_features.federated.moments import pack_moments, pack_pooled, unpack_layers
from stages.extract_features.plan import ExtractionPlan
from stages.extract_features.run import load


def join(message: Message, context: Context) -> RecordDict:
    """Check the node's data and frozen model, and return its introduction."""
    node, job = _job(context)
    channels = backbones.layer_channels(job.model_dir, job.settings.layers)
    agreement = job.feature_set.content.common() | {"channels": channels}
    return members.introduction(node.client_id, node.name, len(_images(job)), agreement)


def moments(message: Message, context: Context) -> RecordDict:
    """Return the moments of the node's maps, which takes one pass of the frozen model per basis image."""
    _, job = _job(context)
    extraction, inputs = _ready(job)
    with progress_bar(len(inputs.noisy), "moments", "image") as bar:
        return pack_moments(extraction.moments(inputs, bar))


def pooled(message: Message, context: Context) -> RecordDict:
    """Return mean and squares of its representations on the common basis, which takes as many passes again."""
    _, job = _job(context)
    extraction, inputs = _ready(job)
    with progress_bar(len(inputs.noisy), "statistics", "image") as bar:
        return pack_pooled(extraction.pooled(inputs, unpack_layers(message.content), bar))


def basis(message: Message, context: Context) -> RecordDict:
    """Check that basis.h5 fits the node's layers, and save it at the path in params.yaml."""
    node, job = _job(context)
    config = _config(context, node)
    file = config.path(config.params.extract_features.basis)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replace_file(file) as received:
        received.write_bytes(np.array(message.content.array_records["file"]["basis.h5"].numpy()).tobytes())
        feature_store.read_basis_file(received, list(job.feature_set.content.layers))
    return RecordDict({"kept": MetricRecord({"bytes": file.stat().st_size})})


def _config(context: Context, node: Node) -> Config:
    config = config_of(context.run_config, node.root, node.device)
    if config.params.extract_features.basis == "auto":
        raise ConfigError("extract_features.basis is auto. Set it to a file for the common basis (data/basis.h5).")
    return config


def _job(context: Context) -> tuple[Node, ExtractionPlan]:
    """Return the extraction that the node would do with a basis of its own images."""
    node = node_of(context)
    config = _config(context, node)
    own = config.params.extract_features.model_copy(update={"basis": "auto"})
    return node, planning.make(Config(config.params.model_copy(update={"extract_features": own}), config.root))


def _images(job: ExtractionPlan) -> np.ndarray:
    return pca.images(job.feature_set.rows, job.settings.basis_images, job.settings.noise_seed)


def _ready(job: ExtractionPlan) -> tuple[Extraction, Inputs]:
    extraction = load(job)
    return extraction, extraction.clean_inputs(_images(job))
