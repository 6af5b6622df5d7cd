"""A client's share of the training set, and the batches drawn from it.

Samples stay where they were placed (`placement`). A batch is gathered there, moved to the device if necessary, and
augmented on the device, without a DataLoader and worker processes; from disk, one batch ahead, in a thread.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline import devices, threads
from stages.train_fl.augmentation import Augmentation, augment, draw, to_model_range
from stages.train_fl.guidance import GuidanceOnDisk, GuidanceRows, GuidanceTargets
from stages.train_fl.images import ImageRows, ImagesOnDisk, in_parts
from stages.train_fl.placement import Placement


@dataclass(frozen=True)
class Batch:
    """Images float32 (B, 3, H, W) in [-1, 1], labels int64 (B,), and guidance targets for methods that use them.

    `second_view` is another random view of the same images, for methods that compare two.
    """

    images: Tensor
    labels: Tensor
    guidance: GuidanceTargets | None = None
    second_view: Tensor | None = None


@dataclass(frozen=True)
class RawBatch:
    """A batch on the device before augmentation; `Batches.augmented` makes its `Batch`.

    Images uint8 (B, 3, H, W), labels int64 (B,), the random numbers of its views, float (B, num_views, numbers per
    view), and guidance targets for methods that use them.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor
    guidance: GuidanceTargets | None = None

    def __len__(self) -> int:
        """Return the number of samples, B."""
        return len(self.labels)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        targets = vars(self.guidance).values() if self.guidance else ()
        return [self.images, self.labels, self.numbers, *targets]

    def like(self, tensors: Sequence[Tensor]) -> "RawBatch":
        """Return a batch of these tensors, which are in the order of `tensors`."""
        images, labels, numbers, *targets = tensors
        return RawBatch(images, labels, numbers, GuidanceTargets(*targets) if targets else None)


@dataclass(frozen=True)
class ClientData:
    """All samples of one client: images uint8 (n, 3, H, W), labels int64 (n,), and guidance targets or None."""

    images: ImageRows
    labels: Tensor
    guidance: GuidanceRows | None = None

    def __len__(self) -> int:
        """Return the number of samples, n."""
        return len(self.labels)

    @property
    def is_on_disk(self) -> bool:
        """True if a batch is read from disk, at least in part."""
        return isinstance(self.images, ImagesOnDisk) or isinstance(self.guidance, GuidanceOnDisk)

    def placed(self, where: Placement, device: str) -> "ClientData":
        """Read data that are all on disk into the memory that `where` names; `device` is the device of training."""
        memory = {"host": "cpu", "device": device}
        images = self.images if where.images == "disk" else self.images.to(memory[where.images])
        guidance = self.guidance
        if isinstance(guidance, GuidanceOnDisk) and where.guidance != "disk":
            guidance = guidance.to(memory[where.guidance])
        return ClientData(images, self.labels.to(memory.get(where.images, "cpu")), guidance)

    def to(self, device: str) -> "ClientData":
        """Copy the data to a device; what is read from disk stays there."""
        images = self.images.to(device) if isinstance(self.images, Tensor) else self.images
        guidance = self.guidance.to(device) if isinstance(self.guidance, GuidanceTargets) else self.guidance
        return ClientData(images, self.labels.to(device), guidance)


_Rows = tuple[Tensor, Tensor, Tensor, GuidanceTargets | None]
"""Images, labels, random numbers and targets of a batch, where they were gathered."""


@dataclass
class Stopwatch:
    """A sum of seconds."""

    seconds: float = 0.0


@dataclass(frozen=True)
class Batches:
    """The batches of one local training: every sample once per epoch, in a new random order.

    The last batch of an epoch may be smaller, down to a single image. Augmentation changes only the images: the cached
    representations are those of the unaugmented image. Order and augmentation are drawn from `generator`, on the CPU,
    an epoch ahead, so that a device gets an epoch's random numbers in one transfer.
    """

    data: ClientData
    epochs: int
    batch_size: int
    augmentation: Augmentation
    generator: torch.Generator
    device: str | None = None  # of the batches; None: that of the data
    num_views: int = 1  # 2: each batch has a second view
    loading: Stopwatch = field(default_factory=Stopwatch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the augmented batches."""
        return map(self.augmented, self.raw())

    def raw(self) -> Iterator[RawBatch]:
        """Yield the batches before augmentation; `loading` sums the host's seconds spent on them."""
        drawn = self._drawn()
        gathered = threads.ahead(self._gather, drawn) if self.data.is_on_disk else map(self._gather, drawn)
        while True:
            started = time.perf_counter()
            rows = next(gathered, None)
            if rows is None:
                return
            batch = self._send(*rows)
            self.loading.seconds += time.perf_counter() - started
            yield batch

    def augmented(self, raw: RawBatch) -> Batch:
        """Make the views of a batch that `raw` yielded."""
        views = [augment(raw.images, self.augmentation, raw.numbers[:, view]) for view in range(self.num_views)]
        return Batch(views[0], raw.labels, raw.guidance, views[1] if self.num_views == 2 else None)

    @property
    def num_full(self) -> int:
        """The number of batches of the full size in all epochs."""
        return self.epochs * (len(self.data) // self.batch_size)

    @property
    def target_device(self) -> torch.device:
        """The device of the batches."""
        return torch.device(self.device) if self.device else self.data.labels.device

    def samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every sample once, in order and without augmentation: images float (B, 3, H, W), labels int64 (B,)."""
        data, device = self.data, self.target_device
        parts = in_parts(data.images, self.batch_size)
        for images, labels in zip(parts, data.labels.split(self.batch_size), strict=True):
            yield to_model_range(images.to(device)), labels.to(device)

    def _drawn(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw each batch's positions, on the device of the labels, and the numbers of its views, on the target."""
        data = self.data
        for _ in range(self.epochs if len(data) else 0):
            order = torch.randperm(len(data), generator=self.generator)
            numbers = torch.cat([self._draw(len(index)) for index in order.split(self.batch_size)])
            order, numbers = devices.send(order, data.labels.device), devices.send(numbers, self.target_device)
            yield from zip(order.split(self.batch_size), numbers.split(self.batch_size), strict=True)

    def _draw(self, count: int) -> Tensor:
        """Draw the numbers of a batch's views: float (count, num_views, numbers per view)."""
        size = self.data.images.shape[-2]
        views = [draw(count, size, self.augmentation, self.generator) for _ in range(self.num_views)]
        return torch.stack(views, 1)

    def _gather(self, drawn: tuple[Tensor, Tensor]) -> _Rows:
        """Gather a batch where the data are."""
        (index, numbers), data = drawn, self.data
        guidance = data.guidance.select(index) if data.guidance is not None else None
        return data.images[index], data.labels[index], numbers, guidance

    def _send(self, images: Tensor, labels: Tensor, numbers: Tensor, guidance: GuidanceTargets | None) -> RawBatch:
        """Send a batch to its device, on the stream of the caller."""
        device = self.target_device
        return RawBatch(
            devices.send(images, device),
            devices.send(labels, device),
            numbers,
            guidance.to(device) if guidance is not None else None,
        )
