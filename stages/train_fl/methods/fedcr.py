"""FedCR (Zhang et al., ICML 2023): a variational bottleneck whose class-wise priors the clients share.

    model:     z = m(x) + sigma(x) eps, eps ~ N(0, 1);  logits linear in z
    client k:  SGD on  mean over L draws of cross-entropy + beta * KL(prior_y || N(m, sigma^2))
               then its expert of class c: product over its samples of N(m_i, sigma_i^2), in natural parameters
               Lambda_k = sum_i 1 / sigma_i^2 and eta_k = sum_i m_i / sigma_i^2
    server:    prior_c moves by beta2, in mean and deviation, to the product of N(0, 1) and the participants' experts:
               precision 1 + sum_k Lambda_k, mean sum_k eta_k / precision;   weights: uniform mean

The divergence is the authors' code's, the reverse of the bound's: the prior's deviation shrinks like n^(-1/2), and the
bound's would explode. Their loop over samples and the sums here are the same product. Their flag beta2 is 0 by
default, which never moves the priors; their README uses 1, and so do we. A class that no participant has keeps its
prior. The authors keep the classifier local and test each client's model; here, as for every method, all is averaged
and the global model is tested, at z = m (they average 30 draws). Guidance acts on m. Experts are made after training,
of clean images.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from pipeline import seeding
from stages.train_fl import losses
from stages.train_fl.client_data import Batch, Batches
from stages.train_fl.methods.base import ClientState, ClientUpdate, Metrics, ServerState, Weights
from stages.train_fl.methods.fedavg import FedAvg, Weighting
from stages.train_fl.methods.local_sgd import LocalSGD
from stages.train_fl.models import FLModel, GaussianBottleneck


class FedCR(FedAvg):
    """FedCR, for a model with a Gaussian bottleneck."""

    def __init__(
        self, local_sgd: LocalSGD, num_draws: int, kl_weight: float, prior_step: float, weighting: Weighting
    ) -> None:
        """L, beta and beta2; 15, 0.001 and 1 with the authors. "uniform" weighting is theirs."""
        super().__init__(local_sgd)
        self._num_draws = num_draws
        self._kl_weight = kl_weight
        self._prior_step = prior_step
        self._weighting = weighting

    def init_server(self, weights: Weights) -> ServerState:
        """Every class's prior is N(0, 1): mean and std, float (K, latent_dim), are sent to clients."""
        model, device = self._local_sgd.model, next(iter(weights.values())).device
        shape = model.num_classes, model.embedding_dim
        prior = {"mean": torch.zeros(shape, device=device), "std": torch.ones(shape, device=device)}
        return ServerState(weights, broadcast=prior)

    def client_update(
        self, weights: Weights, broadcast: Weights, state: ClientState, batches: Batches, learning_rate: float
    ) -> tuple[ClientUpdate, ClientState, Metrics]:
        """Local SGD; sends its experts' precision and shift (K, latent_dim) and sample counts (K,).

        Noise has its own generator, keyed by that of the batches: their order is every other method's.
        """
        noise = seeding.torch_generator(batches.generator.initial_seed(), "fedcr noise")
        objective = functools.partial(self._compress, prior=broadcast, noise=noise)
        update, metrics = self._local_sgd(weights, batches, learning_rate, objective)
        sums, counts = self._local_sgd.class_sums(batches, _natural_parameters)
        precision, shift = sums.chunk(2, dim=1)
        extras = {"precision": precision.contiguous(), "shift": shift.contiguous(), "counts": counts}
        return replace(update, extras=extras), state, metrics

    def server_update(self, state: ServerState, updates: list[ClientUpdate]) -> tuple[ServerState, Metrics]:
        """The mean of the weights, and the new priors."""
        experts = {name: torch.stack([update.extras[name] for update in updates]) for name in updates[0].extras}
        mean, std = new_priors(**state.broadcast, **experts, step=self._prior_step)
        return ServerState(self._average(updates, self._weighting), broadcast={"mean": mean, "std": std}), {}

    def _compress(
        self, model: FLModel, batch: Batch, prior: Weights, noise: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mean, std = _distribution(model, batch.images)
        draws = torch.randn((self._num_draws, *mean.shape), generator=noise).to(mean.device)
        logits = model.classifier((mean + std * draws).flatten(0, 1))  # (L*B, K)
        labels = batch.labels.repeat(self._num_draws)
        divergence = losses.gaussian_kl(prior["mean"][batch.labels], prior["std"][batch.labels], mean, std)
        terms = {
            "cross_entropy": functional.cross_entropy(logits, labels),
            "divergence": self._kl_weight * divergence,
        }
        return mean, terms


def _distribution(model: FLModel, images: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(model.bottleneck, GaussianBottleneck)
    return model.bottleneck.distribution(model.features(images))


def _natural_parameters(model: FLModel, images: Tensor) -> Tensor:
    """1 / sigma^2 and m / sigma^2 side by side: (B, 2 * latent_dim)."""
    mean, std = _distribution(model, images)
    precision = std.square().reciprocal()
    return torch.cat([precision, mean * precision], dim=1)


def new_priors(
    mean: Tensor, std: Tensor, precision: Tensor, shift: Tensor, counts: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """The product of N(0, 1) and the participants' experts, per class and dimension.

    Args:
        mean: the priors' means, float (K, D).
        std: the priors' standard deviations, float (K, D).
        precision: sum_i 1 / sigma_i^2 over a participant's samples of a class, float (S, K, D).
        shift: sum_i m_i / sigma_i^2, float (S, K, D).
        counts: samples, float (S, K); a class without any keeps its prior.
        step: beta2 in [0, 1]: how far mean and deviation move to the product's.

    Returns:
        New means and standard deviations, float (K, D).
    """
    total = 1 + precision.sum(0)
    seen = counts.sum(0)[:, None] > 0
    new_mean = torch.lerp(mean, shift.sum(0) / total, step)
    new_std = torch.lerp(std, total.rsqrt(), step)
    return torch.where(seen, new_mean, mean), torch.where(seen, new_std, std)
