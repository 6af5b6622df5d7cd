"""FedCR (Zhang et al., ICML 2023, https://proceedings.mlr.press/v202/zhang23w.html): a variational bottleneck.

    model:     z = m(x) + sigma(x) eps, eps ~ N(0, 1);  logits linear in z
    client k:  SGD on  mean over L draws of cross-entropy + beta * KL(prior_y || N(m, sigma^2))
               then its expert of class c: product over its samples of N(m_i, sigma_i^2), in natural parameters
               Lambda_k = sum_i 1 / sigma_i^2 and eta_k = sum_i m_i / sigma_i^2
    server:    prior_c moves by beta2, in mean and deviation, to the product of N(0, 1) and the participants' experts:
               precision 1 + sum_k Lambda_k, mean sum_k eta_k / precision;   weights: uniform mean

The clients share a prior per class. A class that no participant has keeps its prior. Guidance acts on m. Experts are
computed after training, from unaugmented images. The divergence is that of the authors' code, the reverse of the
bound's: the prior's deviation shrinks like n^(-1/2), and the bound's divergence would explode.

The authors' flag beta2 is 0 by default, which never moves the priors; their README uses 1, and so does this code. They
keep the classifier local and test each client's model with 30 draws; here, as for every method, all weights are
averaged and the global model is tested, at z = m.
"""

import functools
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline import devices, seeding
from pipeline.settings.params import MethodSettings
from stages.train_fl import losses
from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.fedavg import FedAvg, Weighting
from stages.train_fl.methods.state import ClientState, ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.models import FLModel, GaussianBottleneck


class FedCR(FedAvg):
    """FedCR, with a Gaussian bottleneck in its model."""

    class Settings(MethodSettings):
        """The values are the authors' README's."""

        algorithm: Literal["fedcr"] = "fedcr"
        latent_dim: int = Field(256, ge=1, description="length of the stochastic representation")
        num_draws: int = Field(15, ge=1, description="noise draws per sample and step")
        kl_weight: float = Field(0.001, ge=0, description="weight of the divergence from the class's prior (beta)")
        prior_step: float = Field(1.0, ge=0, le=1, description="step of the priors per round (beta2); 0 keeps N(0, 1)")
        weighting: Weighting = Field(
            "uniform", description="mean over participants: uniform (authors' code) or samples"
        )

    @classmethod
    def model_parts(cls, settings: Any) -> dict[str, Any]:
        """Add a Gaussian bottleneck."""
        return {"latent_dim": settings.latent_dim}

    def init_server(self, weights: Weights) -> ServerState:
        """Broadcast every class's prior, N(0, 1): mean and std, float (K, latent_dim)."""
        model, device = self.local_sgd.model, next(iter(weights.values())).device
        shape = model.num_classes, model.embedding_dim
        prior = {"mean": torch.zeros(shape, device=device), "std": torch.ones(shape, device=device)}
        return ServerState(weights, broadcast=prior)

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Run local SGD; send the experts' precision and shift (K, latent_dim), and sample counts (K,)."""
        # The noise has its own generator, so that batches come in the same order as for every other method.
        noise = seeding.torch_generator(batches.generator.initial_seed(), "fedcr noise")
        objective = functools.partial(self._compress, prior=broadcast, noise=noise)
        update, metrics = self.local_sgd(weights, batches, learning_rate, objective)
        sums, counts = self.local_sgd.class_sums(batches, _natural_parameters)
        precision, shift = (part.contiguous() for part in sums.chunk(2, dim=1))
        return replace(update, extras={"precision": precision, "shift": shift, "counts": counts}), state, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """Average the weights and update the priors."""
        mean, std = new_priors(**state.broadcast, **self._stack_extras(updates), step=self.settings.prior_step)
        return ServerState(self._average(updates, self.settings.weighting), broadcast={"mean": mean, "std": std}), {}

    def _compress(
        self, model: FLModel, batch: Batch, prior: Weights, noise: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mean, std = _distribution(model, batch.images)
        num_draws = self.settings.num_draws
        draws = devices.send(torch.randn((num_draws, *mean.shape), generator=noise), mean.device)
        logits = model.classifier((mean + std * draws).flatten(0, 1))  # (L*B, K)
        entropy = functional.cross_entropy(logits, batch.labels.repeat(num_draws))
        divergence = losses.gaussian_kl(prior["mean"][batch.labels], prior["std"][batch.labels], mean, std)
        return mean, {"cross_entropy": entropy, "divergence": self.settings.kl_weight * divergence}


def _distribution(model: FLModel, images: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(model.bottleneck, GaussianBottleneck)
    return model.bottleneck.distribution(model.features(images))


def _natural_parameters(model: FLModel, images: Tensor) -> Tensor:
    """Return 1 / sigma^2 and m / sigma^2 side by side, (B, 2 * latent_dim)."""
    mean, std = _distribution(model, images)
    precision = std.square().reciprocal()
    return torch.cat([precision, mean * precision], dim=1)


def new_priors(
    mean: Tensor, std: Tensor, precision: Tensor, shift: Tensor, counts: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """Move the priors to the product of N(0, 1) and the participants' experts, per class and dimension.

    Args:
        mean: The priors' means, float (K, D).
        std: The priors' standard deviations, float (K, D).
        precision: sum_i 1 / sigma_i^2 over a participant's samples of a class, float (S, K, D).
        shift: sum_i m_i / sigma_i^2, float (S, K, D).
        counts: Number of samples, float (S, K); a class without samples keeps its prior.
        step: beta2 in [0, 1], the step of mean and deviation towards the product's.

    Returns:
        New means and standard deviations, float (K, D).
    """
    total = 1 + precision.sum(0)
    seen = counts.sum(0)[:, None] > 0
    new_mean = torch.lerp(mean, shift.sum(0) / total, step)
    new_std = torch.lerp(std, total.rsqrt(), step)
    return torch.where(seen, new_mean, mean), torch.where(seen, new_std, std)
