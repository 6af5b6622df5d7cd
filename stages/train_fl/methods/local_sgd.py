"""The local training that methods share: SGD on a method's objective, from the global weights.

A method may add terms to the loss (its objective) or correct the gradients (control variates, proximal terms) before
the optimiser's momentum. FedDifRC's guidance is added here, and so works with any method. Gradients are clipped after
both, and before weight decay, which the optimiser applies.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.sgd import sgd

from stages.train_fl.client_data import Batch, Batches, RawBatch
from stages.train_fl.graphs import FEWEST_STEPS, Graphs
from stages.train_fl.guidance import GuidanceTargets
from stages.train_fl.methods.state import ClientUpdate, Metrics, Weights
from stages.train_fl.models import FLModel

Objective = Callable[[FLModel, Batch], tuple[Tensor, dict[str, Tensor]]]
"""(model, batch) -> embeddings (B, D), on which guidance acts, and named scalar terms; the loss is their sum."""

Correction = Callable[[list[Tensor], list[Tensor]], None]
"""(parameters, gradients) -> None: changes the gradients in place."""

Guide = Callable[[Tensor, GuidanceTargets], dict[str, Tensor]]
"""(projected embeddings (B, D), targets) -> named scalar terms, added to the loss."""


@dataclass(frozen=True)
class LocalSGD:
    """A network to train and the optimiser's settings; every round starts with an empty momentum buffer."""

    model: FLModel
    momentum: float
    weight_decay: float
    guidance: Guide | None = None
    gradient_clipping: float | None = None
    graphs: Graphs | None = None  # to replay steps on a GPU

    @functools.cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Return the names of the trained parameters; every other entry of the weights is a buffer."""
        return tuple(name for name, value in self.model.named_parameters() if value.requires_grad)

    def laid_out(self, tensors: Weights) -> Weights:
        """Return tensors with the strides of the network's own of the same name and shape; copies those that differ.

        Files and messages keep no strides. On a GPU, operations on lists of tensors (torch._foreach_), which correct
        the gradients, take one launch only if the tensors of all lists have the same ones.
        """
        own = self.model.state_dict() if tensors else {}
        return {
            name: torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
            if (like := own.get(name)) is not None and like.shape == value.shape and like.stride() != value.stride()
            else value
            for name, value in tensors.items()
        }

    def __call__(
        self,
        weights: Weights,
        batches: Batches,
        learning_rate: float,
        objective: Objective,
        correction: Correction | None = None,
    ) -> tuple[ClientUpdate, Metrics]:
        """Train from `weights`; return the update and the mean of each term of the loss over samples."""
        device = batches.target_device
        if self.graphs is None or device.type != "cuda" or batches.num_full < FEWEST_STEPS:
            return self._train(weights, batches, learning_rate, objective, correction, lambda step: step)
        with self.graphs.capturable_stream(device):
            replayed = functools.partial(self.graphs.runner, batch_size=batches.batch_size)
            return self._train(weights, batches, learning_rate, objective, correction, replayed)

    def _train(
        self,
        weights: Weights,
        batches: Batches,
        learning_rate: float,
        objective: Objective,
        correction: Correction | None,
        wrap: Callable[[Callable[[RawBatch], None]], Callable[[RawBatch], None]],
    ) -> tuple[ClientUpdate, Metrics]:
        model = self.model
        state = model.state_dict()  # views of the parameters and buffers
        if {name: value.shape for name, value in state.items()} != {k: v.shape for k, v in weights.items()}:
            model.load_state_dict(weights)  # raises, with all differences
        for name, value in state.items():
            value.copy_(weights[name])  # load_state_dict takes as long as half a step of a small network
        model.train()
        parameters: list[Tensor] = [value for value in model.parameters() if value.requires_grad]
        buffers: list[Tensor | None] = [None] * len(parameters)
        sums: dict[str, Tensor] = {}

        def step(raw: RawBatch) -> None:
            terms = self._terms(objective, batches.augmented(raw))
            for parameter in parameters:
                parameter.grad = None
            functools.reduce(torch.add, terms.values()).backward()
            if correction:
                correction(parameters, _gradients(parameters))
            if self.gradient_clipping is not None:
                nn.utils.clip_grad_norm_(parameters, self.gradient_clipping)
            self._step(parameters, buffers, learning_rate)
            _accumulate(sums, terms, len(raw))

        run = wrap(step)
        num_seen = num_steps = 0
        for raw in batches.raw():
            run(raw)
            num_seen += len(raw)
            num_steps += 1
        trained = {name: value.clone() for name, value in state.items()}
        # One transfer for all terms: no step waits for the device.
        values = torch.stack(list(sums.values())).tolist() if sums else []
        means = {name: value / num_seen for name, value in zip(sums, values, strict=True)}
        return ClientUpdate(trained, len(batches.data), num_steps), means

    @torch.no_grad()
    def class_sums(self, batches: Batches, function: Callable[[FLModel, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Sum `function(model, images)`, (B, D), over the client's samples of each class: (K, D), and counts (K,).

        The weights are those of the last training, in evaluation mode, without gradients and augmentation. (The code of
        FedProto and FedCR collects during the last epoch, while the model still changes; FedNH's does as here, but on
        augmented images.)
        """
        self.model.eval()
        sums, counts = [], []
        for images, labels in batches.samples():
            # A product with the one-hot labels is deterministic on a GPU, unlike scatter_add.
            values = function(self.model, images)
            one_hot = functional.one_hot(labels, self.model.num_classes).to(values.dtype)
            sums.append(one_hot.T @ values)
            counts.append(one_hot.sum(0))
        return torch.stack(sums).sum(0), torch.stack(counts).sum(0)

    def _step(self, parameters: list[Tensor], buffers: list[Tensor | None], learning_rate: float) -> None:
        """Take a step of SGD on the parameters that have a gradient, and update their momentum buffers.

        Fused SGD takes one pass over the parameters: a third of the default's time on a CPU. torch.optim.SGD would call
        the same function, but imports torch's compiler first, which takes as long as the rest of a run's start.
        """
        reached = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
        first = [i for i in reached if buffers[i] is None]
        for chosen in (first, [i for i in reached if buffers[i] is not None]):
            own_buffers = [buffers[i] for i in chosen]
            sgd(
                [parameters[i] for i in chosen],
                [gradient for i in chosen if (gradient := parameters[i].grad) is not None],
                own_buffers,
                fused=True,
                lr=learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                dampening=0,
                nesterov=False,
                maximize=False,
            )
            for i, buffer in zip(chosen, own_buffers, strict=True):
                buffers[i] = buffer

    def _terms(self, objective: Objective, batch: Batch) -> dict[str, Tensor]:
        embeddings, terms = objective(self.model, batch)
        if self.guidance:
            assert batch.guidance is not None
            terms = terms | self.guidance(self.model.projector(embeddings), batch.guidance)
        return terms


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    """Return the gradients; zero for a parameter that no term of the loss reaches."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _accumulate(sums: dict[str, Tensor], terms: dict[str, Tensor], count: int) -> None:
    for name, term in terms.items():
        if name not in sums:
            sums[name] = torch.zeros_like(term)
        sums[name].add_(term.detach(), alpha=count)
