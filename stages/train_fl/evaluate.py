"""The global model on held-out images: accuracy and loss, and accuracy by domain and by client.

Images go through the model in batches of a fixed size, on a CPU several batches side by side, each in a thread: they
are large enough that Python's interpreter lock does not matter. Results do not depend on the number of threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stages.train_fl.augmentation import to_model_range
from stages.train_fl.client_data import ClientData
from stages.train_fl.data import HeldOut
from stages.train_fl.images import ImageRows, in_parts
from stages.train_fl.models import FLModel

Predictor = Callable[[ImageRows], Tensor]
"""Images uint8 (N, 3, H, W) -> predicted labels int64 (N,), on the device."""

_BATCH = 500  # images per forward pass on a GPU
CPU_BATCH = 100


class Evaluator(Protocol):
    """Evaluates the global model for one kind of training."""

    def scores(self, model: FLModel) -> dict[str, float]:
        """Compute held-out accuracy and loss after a round."""

    def final(self, model: FLModel) -> tuple[Predictor, dict[str, float]]:
        """Return the final model's predictor, and further metrics."""


class Classification:
    """Supervised training: the model's own classifier."""

    def __init__(self, held_out: HeldOut, num_threads: int = 1) -> None:
        """Evaluate on `held_out`."""
        self._held_out, self._num_threads = held_out, num_threads

    def scores(self, model: FLModel) -> dict[str, float]:
        """Compute accuracy, the share of correct predictions, and loss, the mean cross-entropy."""
        labels = self._held_out.labels
        logits = self._logits(model, self._held_out.images)
        loss = functional.cross_entropy(logits.double(), labels).item()
        return {"accuracy": (logits.argmax(1) == labels).sum().item() / len(labels), "loss": loss}

    def final(self, model: FLModel) -> tuple[Predictor, dict[str, float]]:
        """Return the classifier, and no further metric."""
        return lambda images: self._logits(model, images).argmax(1), {}

    def _logits(self, model: FLModel, images: ImageRows) -> Tensor:
        model.eval()
        return in_batches(lambda batch: model(batch)[1], images, self._held_out.labels.device, self._num_threads)


def in_batches(
    function: Callable[[Tensor], Tensor], images: ImageRows, device: torch.device, num_threads: int = 1
) -> Tensor:
    """Apply `function` to images uint8 (N, 3, H, W) on any device or on disk, on `device` and in the model's range."""

    @torch.inference_mode()
    def of(batch: ImageRows) -> Tensor:
        return function(to_model_range(batch.to(device)))

    if device.type == "cpu" and num_threads > 1:  # every thread reads its own batches
        return torch.cat(in_threads(of, images.split(CPU_BATCH), num_threads))
    return torch.cat([of(batch) for batch in in_parts(images, CPU_BATCH if device.type == "cpu" else _BATCH)])


def in_threads(function: Callable[[Any], Any], items: Sequence[Any], num_threads: int) -> list[Any]:
    """Return [function(item) for item in items], computed in threads."""
    if num_threads == 1 or len(items) == 1:
        return [function(item) for item in items]
    # torch gives a new thread all cores until it is told the number.
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(function, items))


def by_domain(predictor: Predictor, held_out: HeldOut, domain_names: list[str]) -> dict[str, float]:
    """Compute the accuracy on each domain's held-out images; domains without any are omitted."""
    right = predictor(held_out.images) == held_out.labels
    masks = {name: held_out.domains == domain for domain, name in enumerate(domain_names)}
    return {name: right[mask].double().mean().item() for name, mask in masks.items() if mask.any()}


def by_client(
    predictor: Predictor, clients: list[ClientData], held_out: HeldOut, cell_counts: np.ndarray, num_classes: int
) -> list[dict[str, float | int | None]]:
    """Compute the global model's accuracy for each client.

    `cell_counts`: samples per client, int64 (num_clients, num_domains * num_classes), where
    cell = domain * num_classes + label.

    Returns:
        Per client: num_samples; train_accuracy on its own samples; held_out_accuracy, the mean of the held-out
        accuracies of its (domain, class) cells weighted by the client's samples in them. None without samples.
    """
    right = (predictor(held_out.images) == held_out.labels).cpu().numpy()
    cells = (held_out.domains * num_classes + held_out.labels).cpu().numpy()
    seen = np.bincount(cells, minlength=cell_counts.shape[1])
    accuracy = np.bincount(cells, right, cell_counts.shape[1]) / np.maximum(seen, 1)
    rows: list[dict[str, float | int | None]] = []
    for client, (data, own) in enumerate(zip(clients, cell_counts, strict=True)):
        weights, train = own * (seen > 0), None
        if len(data):
            train = (predictor(data.images).cpu() == data.labels.cpu()).double().mean().item()
        held = float(weights @ accuracy / weights.sum()) if weights.sum() else None
        rows.append({"client": client, "num_samples": len(data), "train_accuracy": train, "held_out_accuracy": held})
    return rows
