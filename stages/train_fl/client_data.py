"""A client's share of the training set, as tensors in memory, and the batches drawn from it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Augmentation = Literal["none", "crop", "crop-flip"]


@dataclass(frozen=True)
class Guidance:
    """Cached representations of the same n images, aligned with their rows."""

    denoised: Tensor  # float16 (n, D)
    prompted: Tensor  # float16 (n, P, D)
    positive: Tensor  # int64 (n,), which of the P prompts is the image's own class

    def take(self, index: Tensor) -> "Guidance":
        """The rows at `index`."""
        return Guidance(self.denoised[index], self.prompted[index], self.positive[index])


@dataclass(frozen=True)
class Batch:
    """Images float32 (B, 3, H, W) in [-1, 1], labels int64 (B,), and the rows of guidance where a method has it."""

    images: Tensor
    labels: Tensor
    guidance: Guidance | None = None


@dataclass(frozen=True)
class ClientData:
    """All samples of one client: images uint8 (n, 3, H, W), labels int64 (n,), guidance or None."""

    images: Tensor
    labels: Tensor
    guidance: Guidance | None = None

    def __len__(self) -> int:
        """Number of samples, n."""
        return len(self.labels)

    def take(self, index: Tensor) -> "ClientData":
        """The samples at `index`."""
        guidance = self.guidance.take(index) if self.guidance else None
        return ClientData(self.images[index], self.labels[index], guidance)

    def to(self, device: str) -> "ClientData":
        """The same data on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        guidance = self.guidance and Guidance(**{k: v.to(device) for k, v in vars(self.guidance).items()})
        return replace(self, guidance=guidance, **moved)


@dataclass(frozen=True)
class Batches:
    """The batches of one local training: every sample once an epoch, in a new random order each time.

    The last batch of an epoch may be smaller. Augmentation changes the images alone; the cached representations are
    those of the clean image. Order and augmentation come from `generator`, which is on the CPU.
    """

    data: ClientData
    epochs: int
    batch_size: int
    augmentation: Augmentation
    generator: torch.Generator

    @property
    def num_samples(self) -> int:
        """Samples of the client, each counted once."""
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        """Draws the batches."""
        data = self.data
        for _ in range(self.epochs):
            order = torch.randperm(len(data), generator=self.generator).to(data.labels.device)
            for index in order.split(self.batch_size):
                images = to_model_range(_augment(data.images[index], self.augmentation, self.generator))
                yield Batch(images, data.labels[index], data.guidance.take(index) if data.guidance else None)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def _augment(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """A random crop of the zero-padded image (by an eighth of its side), and for "crop-flip" a random mirror image."""
    if augmentation == "none":
        return images
    n, _, height, width = images.shape
    pad = height // 8
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    top, left = torch.randint(2 * pad + 1, (2, n, 1, 1), generator=generator).to(images.device)
    rows = top + torch.arange(height, device=images.device)[:, None]  # (n, H, 1)
    columns = left + torch.arange(width, device=images.device)  # (n, 1, W)
    if augmentation == "crop-flip":
        flip = torch.rand((n, 1, 1), generator=generator).to(images.device) < 0.5
        columns = torch.where(flip, columns.flip(2), columns)
    sample = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows, columns].permute(0, 3, 1, 2)  # (n, 3, H, W)
