"""Accuracy and loss of the global model on held-out images."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.train_fl.client_data import to_model_range


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> dict[str, float]:
    """Evaluates a model as it stands, with BatchNorm in evaluation mode.

    Args:
        model: images -> (embeddings, logits).
        images: uint8 (N, 3, H, W).
        labels: int64 (N,).
        batch_size: images per forward pass.

    Returns:
        accuracy: share of right answers, 0 to 1; loss: mean cross-entropy.
    """
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=labels.device)
    loss = torch.zeros((), dtype=torch.float64, device=labels.device)
    for batch, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        _, logits = model(to_model_range(batch))
        right += (logits.argmax(1) == truth).sum()
        loss += functional.cross_entropy(logits, truth, reduction="sum")
    return {"accuracy": right.item() / len(labels), "loss": loss.item() / len(labels)}
