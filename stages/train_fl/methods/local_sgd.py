"""The local training that methods share: SGD on a method's objective, from the global weights.

A method may add terms to the loss (its objective) or correct the gradients before the optimiser sees them (control
variates, proximal terms): inside the gradient, hence inside the momentum. Clipping acts on what comes of both, before
weight decay, which the optimiser adds. FedDifRC's guidance is added here, so it goes on top of any method. Nothing in a
step waits for the device: the terms are summed there and read once, at the end. The optimiser is PyTorch's fused SGD,
one pass over the parameters, which on a CPU takes a third of the default's time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.base import ClientUpdate, Metrics, Weights
from stages.train_fl.methods.feddifrc import GuidanceLoss
from stages.train_fl.models import FLModel

Objective = Callable[[FLModel, Batch], tuple[Tensor, dict[str, Tensor]]]
"""(model, batch) -> embeddings (B, D), on which guidance acts, and named scalar terms; the loss is their sum."""

Correction = Callable[[list[Tensor], list[Tensor]], None]
"""(parameters, gradients) -> None: changes the gradients in place."""


@dataclass(frozen=True)
class LocalSGD:
    """A network to train in and the optimiser's settings; the momentum buffer starts anew each round."""

    model: FLModel
    momentum: float
    weight_decay: float
    guidance: GuidanceLoss | None = None
    gradient_clipping: float | None = None
    parameter_names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Notes the names of the trained parameters: all else in the weights is a buffer."""
        names = tuple(name for name, value in self.model.named_parameters() if value.requires_grad)
        object.__setattr__(self, "parameter_names", names)

    def __call__(
        self,
        weights: Weights,
        batches: Batches,
        learning_rate: float,
        objective: Objective,
        correction: Correction | None = None,
    ) -> tuple[ClientUpdate, Metrics]:
        """Trains from `weights`; returns the update and the mean of each term of the loss over samples."""
        model = self.model
        model.load_state_dict(weights)
        model.train()
        parameters: list[Tensor] = [value for value in model.parameters() if value.requires_grad]
        optimizer = torch.optim.SGD(
            parameters, learning_rate, momentum=self.momentum, weight_decay=self.weight_decay, fused=True
        )
        sums: dict[str, Tensor] = {}
        num_seen = num_steps = 0
        for batch in batches:
            terms = self._terms(objective, batch)
            optimizer.zero_grad(set_to_none=True)
            _sum(terms).backward()
            if correction:
                correction(parameters, _gradients(parameters))
            if self.gradient_clipping is not None:
                nn.utils.clip_grad_norm_(parameters, self.gradient_clipping)
            optimizer.step()
            _accumulate(sums, terms, len(batch.labels))
            num_seen += len(batch.labels)
            num_steps += 1
        trained = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return ClientUpdate(trained, batches.num_samples, num_steps), _means(sums, num_seen)

    @torch.no_grad()
    def class_sums(self, batches: Batches, function: Callable[[FLModel, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Sums of `function(model, images)`, (B, D), over the client's samples of each class: (K, D), and counts (K,).

        With the weights that the last training left, in evaluation mode, without gradients and augmentation: what a
        client says of its data after training is said by one model. (FedProto's and FedCR's code collect it while the
        last epoch still moves the model; FedNH's as here, but on augmented images.)
        """
        self.model.eval()
        parts = [
            class_sums(function(self.model, images), labels, self.model.num_classes)
            for images, labels in batches.samples()
        ]
        sums, counts = zip(*parts, strict=True)
        return torch.stack(sums).sum(0), torch.stack(counts).sum(0)

    def _terms(self, objective: Objective, batch: Batch) -> dict[str, Tensor]:
        embeddings, terms = objective(self.model, batch)
        if self.guidance:
            assert batch.guidance is not None
            terms = terms | self.guidance(self.model.projector(embeddings), batch.guidance)
        return terms


def class_sums(values: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sums per class: float (B, D), int64 (B,) -> (num_classes, D), and the samples of each class (num_classes,).

    A product with the one-hot labels: the same numbers on every run, also on a GPU.
    """
    one_hot = functional.one_hot(labels, num_classes).to(values.dtype)
    return one_hot.T @ values, one_hot.sum(0)


def _sum(terms: dict[str, Tensor]) -> Tensor:
    first, *rest = terms.values()
    for term in rest:
        first = first + term
    return first


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    """The gradients; zero for a parameter that no term of the loss reaches."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _accumulate(sums: dict[str, Tensor], terms: dict[str, Tensor], count: int) -> None:
    for name, term in terms.items():
        if name not in sums:
            sums[name] = torch.zeros_like(term)
        sums[name].add_(term.detach(), alpha=count)


def _means(sums: dict[str, Tensor], count: int) -> Metrics:
    """One transfer for all terms."""
    values = torch.stack(list(sums.values())).tolist() if sums else []
    return {name: value / count for name, value in zip(sums, values, strict=True)}
