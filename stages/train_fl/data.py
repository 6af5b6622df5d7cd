"""The data of a run: which client holds which samples and guidance targets, and which samples are held out."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline import seeding
from pipeline.data.datasets import Images, PreparedDataset, stratified_split
from pipeline.errors import ConfigError
from pipeline.feature_store import FeatureSet
from pipeline.settings.config import Config
from pipeline.settings.params import Nodes
from stages.train_fl import feature_check, methods, partitions, placement, synthetic
from stages.train_fl.client_data import ClientData
from stages.train_fl.guidance import GuidanceOnDisk, GuidanceSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Evaluation data on the device: images uint8 (N, 3, H, W), labels and domains int64 (N,)."""

    images: Tensor
    labels: Tensor
    domains: Tensor


@dataclass(frozen=True)
class FederatedData:
    """Clients and their data; `parts` are positions in the training split. Counts are of real samples."""

    clients: list[ClientData]
    parts: list[np.ndarray]
    label_counts: np.ndarray  # int64 (num_clients, num_classes)
    cell_counts: np.ndarray  # int64 (num_clients, num_domains * num_classes), cell = domain * num_classes + label
    synthetic_counts: np.ndarray  # int64 (num_clients, num_classes), generated samples
    held_out: HeldOut
    dataset: PreparedDataset
    features: FeatureSet | None
    guidance_dim: int | None  # length of the targets, for methods with guidance
    synthetic_hash: str | None  # of the generated images' data set, where clients got some


def load(
    config: Config, method: str, partition: str, seed: int, device: str, client_id: int | None = None
) -> FederatedData:
    """Split the data set, apply the long tail, partition it across clients, and place it on its device.

    `seed` determines the validation split, the long tail, the partition and the choice of generated images. `client_id`
    is the only client to load; None: all. Cached representations are loaded for methods with guidance.

    Raises:
        ConfigError: Settings do not fit the data.
        DataError: The data set is missing or damaged.
        FeatureSetError: The feature set is missing or damaged, or does not fit.
    """
    params, settings = config.params.train_fl, config.settings("methods", method)
    guidance = methods.guidance_of(settings)
    dataset = PreparedDataset(config.dataset_dir)
    features = feature_check.open_checked(config, dataset) if guidance else None
    source = GuidanceSource(features, guidance) if features and guidance else None
    everything = dataset.load("train")
    if features:
        features.expect_labels(everything.labels)
    train, index, held = _split(dataset, everything, config, seed)
    if params.imbalance_factor < 1:
        kept = partitions.long_tail(train.labels, params.imbalance_factor, seeding.numpy_generator(seed, "long tail"))
        train, index = train.take(kept), index[kept]
    parts = _assign(config, partition, train, seed, client_id)
    if client_id is None:
        groups = {"classes": (train.labels, dataset.class_names), "domains": (train.domains, dataset.domain_names)}
        for line in partitions.left_out(parts, groups):
            log.warning("partitions.%s: %s", partition, line)
    if features and guidance:
        needed = np.concatenate([index[part] for part in parts])
        features.require(needed)
        feature_check.check_method(features, needed, guidance, methods.method_class(settings).needs_labels, method)
    counts = partitions.label_counts(parts, train.labels, len(dataset.class_names))
    extra, synthetic_hash = _synthetic(config, dataset, bool(source), counts, seed, client_id or 0)
    image_bytes = counts.sum() * train.images[0].nbytes + sum(images.images.nbytes for images in extra)
    image_bytes += held.images.nbytes  # which are always on the device
    where = placement.place(image_bytes, counts.sum() * source.bytes_per_sample() if source else 0, device)
    clients = [
        _client(train.take(part), images, source, index[part], where).to(device if where == "device" else "cpu")
        for part, images in zip(parts, extra, strict=True)
    ]
    num_classes, num_domains = len(dataset.class_names), len(dataset.domain_names)
    cells = train.domains * num_classes + train.labels
    return FederatedData(
        clients=clients,
        parts=[index[part] for part in parts],
        label_counts=counts,
        cell_counts=partitions.label_counts(parts, cells, num_domains * num_classes),
        synthetic_counts=np.stack([np.bincount(images.labels, minlength=num_classes) for images in extra]),
        held_out=held_out(held, device),
        dataset=dataset,
        features=features,
        guidance_dim=source.num_dims if source else None,
        synthetic_hash=synthetic_hash,
    )


def held_out(images: Images, device: str) -> HeldOut:
    """Return images as evaluation data on a device."""
    return HeldOut(*(tensor.to(device) for tensor in _tensors(images)))


def _assign(config: Config, partition: str, train: Images, seed: int, client_id: int | None) -> list[np.ndarray]:
    """Return every client's positions in `train`, or only those of `client_id`."""
    settings = config.settings("partitions", partition)
    if isinstance(settings, Nodes):
        if client_id is None:
            raise ConfigError(
                f"partitions.{partition} needs a federation (nodes have their own images). Use `flwr run`."
            )
        return [np.arange(len(train))]
    rng = seeding.numpy_generator(seed, "partition")
    try:
        parts = partitions.assign(settings, train.labels, train.domains, config.params.train_fl.num_clients, rng)
    except ConfigError as error:
        raise ConfigError(f"partitions.{partition}: {error}") from None
    if client_id is None:
        return parts
    if client_id >= len(parts):
        problem = f"client-id {client_id} is too high (partitions.{partition} has {len(parts)} clients)"
        raise ConfigError(f"{problem}. Use a lower one.")
    return [parts[client_id]]


def _split(dataset: PreparedDataset, train: Images, config: Config, seed: int) -> tuple[Images, np.ndarray, Images]:
    """Return the images clients train on, their positions in the training split, and the images held out."""
    params = config.params.train_fl
    if params.evaluate_on == "test":
        return train, np.arange(len(train)), dataset.load("test")
    count = max(1, round(params.validation_fraction * len(train)))
    cells = train.domains * len(dataset.class_names) + train.labels
    held, kept = stratified_split(cells, count, seeding.numpy_generator(seed, "validation split"))
    return train.take(kept), kept, train.take(held)


def _synthetic(
    config: Config, dataset: PreparedDataset, guided: bool, counts: np.ndarray, seed: int, first_client: int
) -> tuple[list[Images], str | None]:
    """Return the generated images of each client, counted from `first_client`, and the hash of their data set."""
    rule = config.params.train_fl.balance_with_synthetic
    if rule == "none":
        size = dataset.image_size
        nothing = Images.of_one_domain(np.empty((0, size, size, 3), np.uint8), np.empty(0, np.int64))
        return [nothing] * len(counts), None
    if guided:
        raise ConfigError(
            "Generated images have no cached representations, which methods with guidance need. Set "
            "train_fl.balance_with_synthetic to none."
        )
    generated = synthetic.open_checked(config.synthetic_dir, dataset)
    images = generated.load("train")
    chosen = [
        images.take(synthetic.top_up(own, images.labels, rule, seeding.numpy_generator(seed, "synthetic", client)))
        for client, own in enumerate(counts, first_client)
    ]
    return chosen, generated.hash


def _client(
    own: Images, extra: Images, source: GuidanceSource | None, index: np.ndarray, where: placement.Placement
) -> ClientData:
    """Assemble one client's samples, in host memory."""
    (images, labels, _), (more_images, more_labels, _) = _tensors(own), _tensors(extra)
    if source is None:
        return ClientData(torch.cat([images, more_images]), torch.cat([labels, more_labels]))
    return ClientData(images, labels, GuidanceOnDisk(source, index) if where == "shards" else source.read(index))


def _tensors(data: Images) -> tuple[Tensor, Tensor, Tensor]:
    """Return images uint8 (N, 3, H, W), labels and domains int64 (N,)."""
    images = torch.from_numpy(np.ascontiguousarray(data.images.transpose(0, 3, 1, 2)))
    return images, torch.from_numpy(data.labels), torch.from_numpy(data.domains)
