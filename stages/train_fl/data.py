"""The data of a run: which client holds which samples and guidance targets, and which samples are held out."""

import logging
from dataclasses import dataclass, replace
from typing import NamedTuple

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
from stages.train_fl.guidance import GuidanceOnDisk, GuidanceSource, TargetSource
from stages.train_fl.images import ImageRows, ImagesOnDisk
from stages.train_fl.placement import Place, Sizes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Evaluation data on the device, images perhaps on disk: uint8 (N, 3, H, W); labels and domains int64 (N,)."""

    images: ImageRows
    labels: Tensor
    domains: Tensor

    def placed(self, where: Place, device: str) -> "HeldOut":
        """Read images that are on disk into the memory that `where` names; the rest goes to `device`."""
        images = self.images if where == "disk" else self.images.to(device if where == "device" else "cpu")
        return HeldOut(images, self.labels.to(device), self.domains.to(device))


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

    @property
    def sizes(self) -> Sizes:
        """The bytes of the data in memory, for data on disk."""
        guidance = sum(data.guidance.nbytes for data in self.clients if isinstance(data.guidance, GuidanceOnDisk))
        return Sizes(sum(data.images.nbytes for data in self.clients), guidance, self.held_out.images.nbytes)

    def placed(self, device: str, trains_here: bool = True) -> "FederatedData":
        """Read what fits into memory, on the device if there is room (`placement`).

        Without `trains_here`, clients' images are only evaluated: they stay off the device, without guidance targets.
        """
        data = self
        if not trains_here:
            data = replace(data, clients=[replace(client, guidance=None) for client in data.clients])
        where = placement.place(data.sizes, device, trains_here)
        clients = [client.placed(where, device) for client in data.clients]
        return replace(data, clients=clients, held_out=data.held_out.placed(where.held_out, device))


def load(
    config: Config,
    method: str,
    partition: str,
    seed: int,
    device: str,
    client_id: int | None = None,
    trains_here: bool = True,
) -> FederatedData:
    """Open the data of a run as `on_disk` does, and read what fits into memory as `FederatedData.placed` does."""
    return on_disk(config, method, partition, seed, client_id).placed(device, trains_here)


def on_disk(
    config: Config,
    method: str,
    partition: str,
    seed: int,
    client_id: int | None = None,
    planned: TargetSource | None = None,
) -> FederatedData:
    """Split the data set, apply the long tail, and partition it across clients; no image is read into memory.

    `seed` determines the validation split, the long tail, the partition and the choice of generated images. `client_id`
    is the only client to open; None: all. Methods with guidance have their cached representations, too, or the targets
    of `planned` in their place.

    Raises:
        ConfigError: Settings do not fit the data.
        DataError: The data set is missing or damaged.
        FeatureSetError: The feature set is missing or damaged, or does not fit.
    """
    params, settings = config.params.train_fl, config.settings("methods", method)
    guidance = methods.guidance_of(settings)
    dataset = PreparedDataset(config.dataset_dir)
    features = feature_check.open_checked(config, dataset) if guidance and not planned else None
    source = GuidanceSource(features, guidance) if features and guidance else planned
    everything = dataset.load("train")
    if features:
        features.expect_labels(everything.labels)
    index, held = _split(dataset, everything, config, seed)
    if params.imbalance_factor < 1:
        rng = seeding.numpy_generator(seed, "long tail")
        index = index[partitions.long_tail(everything.labels[index], params.imbalance_factor, rng)]
    labels, domains = everything.labels[index], everything.domains[index]
    parts = _assign(config, partition, labels, domains, seed, client_id)
    if client_id is None:
        groups = {"classes": (labels, dataset.class_names), "domains": (domains, dataset.domain_names)}
        for line in partitions.left_out(parts, groups):
            log.warning("partitions.%s: %s", partition, line)
    if features and guidance:
        needed = np.concatenate([index[part] for part in parts])
        features.require(needed)
        feature_check.check_method(features, needed, guidance, methods.method_class(settings).needs_labels, method)
    num_classes, num_domains = len(dataset.class_names), len(dataset.domain_names)
    counts = partitions.label_counts(parts, labels, num_classes)
    extra = _synthetic(config, dataset, bool(source), counts, seed, client_id or 0)
    clients = [
        _client(everything, index[part], extra.images, chosen, source)
        for part, chosen in zip(parts, extra.chosen, strict=True)
    ]
    cells = domains * num_classes + labels
    return FederatedData(
        clients=clients,
        parts=[index[part] for part in parts],
        label_counts=counts,
        cell_counts=partitions.label_counts(parts, cells, num_domains * num_classes),
        synthetic_counts=partitions.label_counts(extra.chosen, extra.images.labels, num_classes),
        held_out=held,
        dataset=dataset,
        features=features,
        guidance_dim=source.num_dims if source else None,
        synthetic_hash=extra.hash,
    )


def held_out(images: Images, device: str) -> HeldOut:
    """Return images as evaluation data, read into memory if they fit."""
    data = _held_out(images, np.arange(len(images)))
    where = placement.place(Sizes(0, 0, data.images.nbytes), device)
    return data.placed(where.held_out, device)


def _assign(
    config: Config, partition: str, labels: np.ndarray, domains: np.ndarray, seed: int, client_id: int | None
) -> list[np.ndarray]:
    """Return every client's positions among the samples with these labels and domains, or only those of `client_id`."""
    settings = config.settings("partitions", partition)
    if isinstance(settings, Nodes):
        if client_id is None:
            raise ConfigError(
                f"partitions.{partition} needs a federation (nodes have their own images). Use `flwr run`."
            )
        return [np.arange(len(labels))]
    rng = seeding.numpy_generator(seed, "partition")
    try:
        parts = partitions.assign(settings, labels, domains, config.params.train_fl.num_clients, rng)
    except ConfigError as error:
        raise ConfigError(f"partitions.{partition}: {error}") from None
    if client_id is None:
        return parts
    if client_id >= len(parts):
        problem = f"client-id {client_id} is too high (partitions.{partition} has {len(parts)} clients)"
        raise ConfigError(f"{problem}. Use a lower one.")
    return [parts[client_id]]


def _split(dataset: PreparedDataset, train: Images, config: Config, seed: int) -> tuple[np.ndarray, HeldOut]:
    """Return the positions in the training split of the images that clients train on, and the images held out."""
    params = config.params.train_fl
    if params.evaluate_on == "test":
        test = dataset.load("test")
        return np.arange(len(train)), _held_out(test, np.arange(len(test)))
    count = max(1, round(params.validation_fraction * len(train)))
    cells = train.domains * len(dataset.class_names) + train.labels
    held, kept = stratified_split(cells, count, seeding.numpy_generator(seed, "validation split"))
    return kept, _held_out(train, held)


def _held_out(images: Images, index: np.ndarray) -> HeldOut:
    labels, domains = torch.from_numpy(images.labels[index]), torch.from_numpy(images.domains[index])
    return HeldOut(ImagesOnDisk((images.images,), index), labels, domains)


class _Synthetic(NamedTuple):
    """Generated images, each client's positions among them, and the hash of their data set if there is one."""

    images: Images
    chosen: list[np.ndarray]
    hash: str | None


def _synthetic(
    config: Config, dataset: PreparedDataset, guided: bool, counts: np.ndarray, seed: int, first_client: int
) -> _Synthetic:
    """Choose the generated images of each client, counted from `first_client`."""
    rule = config.params.train_fl.balance_with_synthetic
    if rule == "none":
        size = dataset.image_size
        nothing = Images.of_one_domain(np.empty((0, size, size, 3), np.uint8), np.empty(0, np.int64))
        return _Synthetic(nothing, [np.empty(0, np.int64)] * len(counts), None)
    if guided:
        raise ConfigError(
            "Generated images have no cached representations, which methods with guidance need. Set "
            "train_fl.balance_with_synthetic to none."
        )
    generated = synthetic.open_checked(config.synthetic_dir, dataset)
    images = generated.load("train")
    chosen = [
        synthetic.top_up(own, images.labels, rule, seeding.numpy_generator(seed, "synthetic", client))
        for client, own in enumerate(counts, first_client)
    ]
    return _Synthetic(images, chosen, generated.hash)


def _client(
    train: Images, index: np.ndarray, extra: Images, chosen: np.ndarray, source: TargetSource | None
) -> ClientData:
    """Return one client's samples on disk: the images `index` of the training split, and generated ones."""
    stores = (train.images, extra.images) if len(chosen) else (train.images,)
    rows = np.concatenate([index, len(train) + chosen]) if len(chosen) else index
    labels = np.concatenate([train.labels[index], extra.labels[chosen]])
    guidance = GuidanceOnDisk(source, index) if source else None
    return ClientData(ImagesOnDisk(stores, rows), torch.from_numpy(labels), guidance)
