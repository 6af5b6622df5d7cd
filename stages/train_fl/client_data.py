"""A client's share of the training set, and the batches drawn from it.

Samples stay where they were placed (`placement`). A batch is gathered there, moved to the device if necessary, and
augmented on the device, without a DataLoader and worker processes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.train_fl.augmentation import Augmentation, augment, draw, to_model_range
from stages.train_fl.guidance import GuidanceRows, GuidanceTargets


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
class ClientData:
    """All samples of one client: images uint8 (n, 3, H, W), labels int64 (n,), and guidance targets or None."""

    images: Tensor
    labels: Tensor
    guidance: GuidanceRows | None = None

    def __len__(self) -> int:
        """Return the number of samples, n."""
        return len(self.labels)

    def to(self, device: str) -> "ClientData":
        """Copy the data to a device; targets that are read from disk stay there."""
        guidance = self.guidance.to(device) if isinstance(self.guidance, GuidanceTargets) else self.guidance
        return ClientData(self.images.to(device), self.labels.to(device), guidance)


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
        """Yield the batches; `loading` sums the host's seconds spent on them."""
        data = self.data
        for _ in range(self.epochs if len(data) else 0):
            order = torch.randperm(len(data), generator=self.generator)
            drawn = torch.cat([self._draw(len(index)) for index in order.split(self.batch_size)])
            order, drawn = order.to(data.labels.device), drawn.to(self.device or data.labels.device)
            for index, numbers in zip(order.split(self.batch_size), drawn.split(self.batch_size), strict=True):
                started = time.perf_counter()
                batch = self._gather(index, numbers)
                self.loading.seconds += time.perf_counter() - started
                yield batch

    def samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every sample once, in order and without augmentation: images float (B, 3, H, W), labels int64 (B,)."""
        data, device = self.data, self.device or self.data.labels.device
        for images, labels in zip(data.images.split(self.batch_size), data.labels.split(self.batch_size), strict=True):
            yield to_model_range(images.to(device)), labels.to(device)

    def _draw(self, count: int) -> Tensor:
        """Draw the numbers of a batch's views: float (count, num_views, numbers per view)."""
        size = self.data.images.shape[-2]
        views = [draw(count, size, self.augmentation, self.generator) for _ in range(self.num_views)]
        return torch.stack(views, 1)

    def _gather(self, index: Tensor, drawn: Tensor) -> Batch:
        data, device = self.data, self.device or self.data.labels.device
        images = data.images[index].to(device, non_blocking=True)
        views = [augment(images, self.augmentation, drawn[:, view]) for view in range(self.num_views)]
        return Batch(
            views[0],
            data.labels[index].to(device, non_blocking=True),
            data.guidance.select(index).to(device) if data.guidance is not None else None,
            views[1] if self.num_views == 2 else None,
        )
