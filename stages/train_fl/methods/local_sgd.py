"""The local training that methods share: SGD on a method's objective, from the global weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.base import ClientUpdate, Metrics, Weights

Objective = Callable[[Tensor, Tensor, Batch], dict[str, Tensor]]
"""(embeddings (B, D), logits (B, K), batch) -> named scalar terms; the loss is their sum."""


@dataclass(frozen=True)
class LocalSGD:
    """A network to train in and the optimiser's settings; the momentum buffer starts anew each round."""

    model: nn.Module
    momentum: float
    weight_decay: float

    def __call__(
        self, weights: Weights, batches: Batches, learning_rate: float, objective: Objective
    ) -> tuple[ClientUpdate, Metrics]:
        """Trains from `weights`; returns the update and the mean of each term of the loss over samples."""
        self.model.load_state_dict(weights)
        self.model.train()
        optimizer = torch.optim.SGD(
            self.model.parameters(), learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        sums: dict[str, Tensor] = {}
        num_seen = num_steps = 0
        for batch in batches:
            embeddings, logits = self.model(batch.images)
            terms = objective(embeddings, logits, batch)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() * len(batch.labels)
            num_seen += len(batch.labels)
            num_steps += 1
        trained = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        metrics = {name: float(total) / num_seen for name, total in sums.items()}
        return ClientUpdate(trained, batches.num_samples, num_steps), metrics
