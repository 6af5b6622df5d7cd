"""A client's share of the training set, and the batches drawn from it.

Samples stay where the data were placed (on the device, in the host's memory, or guidance in the shards); a batch is
gathered there, moved if it must be, and augmented on the device. No DataLoader, no worker processes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from stages.train_fl.augmentation import Augmentation, augment, to_model_range

__all__ = ["Augmentation", "Batch", "Batches", "ClientData", "Guidance", "GuidanceRows", "Stopwatch", "to_model_range"]


@dataclass(frozen=True)
class Guidance:
    """Cached representations of the same n images, aligned with their rows."""

    denoised: Tensor  # float16 (n, D)
    prompted: Tensor  # float16 (n, P, D)
    positive: Tensor  # int64 (n,), which of the P prompts is the image's own class

    def take(self, index: Tensor) -> "Guidance":
        """The rows at `index`."""
        return Guidance(self.denoised[index], self.prompted[index], self.positive[index])

    def to(self, device: str | torch.device) -> "Guidance":
        """The same rows on a device."""
        return Guidance(
            *(value.to(device, non_blocking=True) for value in (self.denoised, self.prompted, self.positive))
        )


class GuidanceRows(Protocol):
    """Guidance in memory, or whatever reads it row by row."""

    def take(self, index: Tensor) -> Guidance:
        """The rows at `index`, in memory."""


@dataclass(frozen=True)
class Batch:
    """Images float32 (B, 3, H, W) in [-1, 1], labels int64 (B,), and the rows of guidance where a method has it.

    `second_view` is another random view of the same images, for methods that ask for two.
    """

    images: Tensor
    labels: Tensor
    guidance: Guidance | None = None
    second_view: Tensor | None = None


@dataclass(frozen=True)
class ClientData:
    """All samples of one client: images uint8 (n, 3, H, W), labels int64 (n,), guidance or None."""

    images: Tensor
    labels: Tensor
    guidance: GuidanceRows | None = None

    def __len__(self) -> int:
        """Number of samples, n."""
        return len(self.labels)

    def to(self, device: str) -> "ClientData":
        """The same data on a device; guidance that is read row by row stays where it is."""
        guidance = self.guidance.to(device) if isinstance(self.guidance, Guidance) else self.guidance
        return ClientData(self.images.to(device), self.labels.to(device), guidance)


@dataclass
class Stopwatch:
    """Seconds spent in something, summed."""

    seconds: float = 0.0


@dataclass(frozen=True)
class Batches:
    """The batches of one local training: every sample once an epoch, in a new random order each time.

    The last batch of an epoch may be smaller, down to a single image. Augmentation changes the images alone; the
    cached representations are those of the clean image. Order and augmentation come from `generator`, on the CPU.
    """

    data: ClientData
    epochs: int
    batch_size: int
    augmentation: Augmentation
    generator: torch.Generator
    device: str | None = None  # where batches are wanted; None: where the data are
    num_views: int = 1
    loading: Stopwatch = field(default_factory=Stopwatch)

    @property
    def num_samples(self) -> int:
        """Samples of the client, each counted once."""
        return len(self.data)

    def with_two_views(self) -> "Batches":
        """The same batches, each with a second view."""
        return replace(self, num_views=2)

    def __iter__(self) -> Iterator[Batch]:
        """Draws the batches; `loading` counts the host's seconds in it."""
        home = self.data.labels.device
        for _ in range(self.epochs if len(self.data) else 0):
            order = torch.randperm(len(self.data), generator=self.generator).to(home)
            for index in order.split(self.batch_size):
                started = time.perf_counter()
                batch = self._gather(index)
                self.loading.seconds += time.perf_counter() - started
                yield batch

    def samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once, in order and without augmentation: images float (B, 3, H, W) and labels int64 (B,)."""
        data, device = self.data, self.device or self.data.labels.device
        for images, labels in zip(data.images.split(self.batch_size), data.labels.split(self.batch_size), strict=True):
            yield to_model_range(images.to(device)), labels.to(device)

    def _gather(self, index: Tensor) -> Batch:
        data, device = self.data, self.device or self.data.labels.device
        images = data.images[index].to(device, non_blocking=True)
        views = [augment(images, self.augmentation, self.generator) for _ in range(self.num_views)]
        return Batch(
            views[0],
            data.labels[index].to(device, non_blocking=True),
            data.guidance.take(index).to(device) if data.guidance is not None else None,
            views[1] if self.num_views == 2 else None,
        )
