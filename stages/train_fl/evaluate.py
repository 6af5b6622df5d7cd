"""The global model on held-out images: accuracy and loss, and accuracy by domain and by client."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stages.train_fl.augmentation import to_model_range
from stages.train_fl.client_data import ClientData
from stages.train_fl.data import HeldOut
from stages.train_fl.models import FLModel

Predictor = Callable[[Tensor], Tensor]
"""Images uint8 (N, 3, H, W) -> predicted labels int64 (N,), on the device."""

_BATCH = 500  # images per forward pass


class Evaluator(Protocol):
    """Evaluates the global model for one kind of training."""

    def scores(self, model: FLModel) -> dict[str, float]:
        """Compute held-out accuracy and loss after a round."""

    def final(self, model: FLModel) -> tuple[Predictor, dict[str, float]]:
        """Return the final model's predictor, and further metrics."""


class Classification:
    """Supervised training: the model's own classifier."""

    def __init__(self, held_out: HeldOut) -> None:
        """Evaluate on `held_out`."""
        self._held_out = held_out

    @torch.inference_mode()
    def scores(self, model: FLModel) -> dict[str, float]:
        """Compute accuracy, the share of correct predictions, and loss, the mean cross-entropy."""
        model.eval()
        images, labels = self._held_out.images, self._held_out.labels
        right = torch.zeros((), dtype=torch.int64, device=labels.device)
        loss = torch.zeros((), dtype=torch.float64, device=labels.device)
        for batch, truth in zip(images.split(_BATCH), labels.split(_BATCH), strict=True):
            _, logits = model(to_model_range(batch))
            right += (logits.argmax(1) == truth).sum()
            loss += functional.cross_entropy(logits, truth, reduction="sum")
        return {"accuracy": right.item() / len(labels), "loss": loss.item() / len(labels)}

    def final(self, model: FLModel) -> tuple[Predictor, dict[str, float]]:
        """Return the classifier, and no further metric."""
        model.eval()
        device = self._held_out.labels.device
        return lambda images: in_batches(lambda batch: model(batch)[1].argmax(1), images, device), {}


@torch.inference_mode()
def in_batches(function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device) -> Tensor:
    """Apply `function` to images uint8 (N, 3, H, W) on any device, on `device` and in the model's range."""
    return torch.cat([function(to_model_range(batch.to(device))) for batch in images.split(_BATCH)])


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
