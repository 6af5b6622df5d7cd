"""The clients' networks: encoder -> (projection head) -> (Gaussian bottleneck) -> embedding -> classifier.

The parts in brackets are optional. `train_fl.projection_dim` adds the projection head to every method alike, so that a
table compares methods and not networks. FedCR needs the bottleneck, and FedNH a cosine classifier. Guidance acts on the
embedding, the classifier's input; if its length differs from that of the cached representations, a linear projector
maps it to theirs. Every part is initialised from its own generator, so the encoder's initial weights do not depend on
the other parts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline import seeding
from stages.train_fl.encoders import BatchNorm1d, Encoder, EncoderSettings


class CosineClassifier(nn.Module):
    """FedNH's classifier: logits = s cos(z, W_c); the unit rows of W are frozen, the factor s is trained.

    W is a buffer (`prototypes`, (K, D)), which only the server updates.
    """

    prototypes: Tensor

    def __init__(self, embedding_dim: int, num_classes: int, scale: float) -> None:
        """Draw orthonormal rows, or, if num_classes > embedding_dim, unit rows of orthonormal columns."""
        super().__init__()
        rows = nn.init.orthogonal_(torch.empty(num_classes, embedding_dim))
        self.register_buffer("prototypes", functional.normalize(rows, dim=1))
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings float (B, D) -> logits (B, K) in [-s, s]."""
        return self.scale * functional.linear(functional.normalize(embeddings, dim=1), self.prototypes)


class GaussianBottleneck(nn.Module):
    """FedCR's stochastic encoder: features -> mean and standard deviation of z; as a layer it gives the mean.

    The deviation is softplus of a linear map, as in the authors' code, and at least 1e-6.
    """

    def __init__(self, features: int, latent_dim: int) -> None:
        """Create the linear map that gives both."""
        super().__init__()
        self.linear = nn.Linear(features, 2 * latent_dim)

    def distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features float (B, D) -> mean and standard deviation, each (B, latent_dim)."""
        mean, raw = self.linear(features).chunk(2, dim=1)
        return mean, functional.softplus(raw).clamp_min(1e-6)

    def forward(self, features: Tensor) -> Tensor:
        """Features float (B, D) -> the mean (B, latent_dim), without noise."""
        return self.distribution(features)[0]


class SimSiamHeads(nn.Module):
    """SimSiam's projection (three layers) and predictor (two, a bottleneck of a quarter), in the classifier's place.

    The projection's last layer is normalised without a ReLU and the predictor's output not at all, as in the paper.
    """

    def __init__(self, embedding_dim: int, head_dim: int, norm_layer: Callable[[int], nn.Module]) -> None:
        """Follow every hidden layer by `norm_layer` and ReLU."""
        super().__init__()
        hidden = max(1, head_dim // 4)
        self.projection = nn.Sequential(
            nn.Linear(embedding_dim, head_dim, bias=False), norm_layer(head_dim), nn.ReLU(),
            nn.Linear(head_dim, head_dim, bias=False), norm_layer(head_dim), nn.ReLU(),
            nn.Linear(head_dim, head_dim, bias=False), norm_layer(head_dim),
        )  # fmt: skip
        self.predictor = nn.Sequential(
            nn.Linear(head_dim, hidden, bias=False), norm_layer(hidden), nn.ReLU(), nn.Linear(hidden, head_dim)
        )

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings float (B, D) -> projections and predictions, each (B, head_dim)."""
        projections = self.projection(embeddings)
        return projections, self.predictor(projections)


class FLModel(nn.Module):
    """An encoder, a classifier on its embedding, and a projector to the space of the guidance."""

    def __init__(self, encoder: nn.Module, embedding_dim: int, num_classes: int) -> None:
        """Join an encoder, images -> (B, embedding_dim), to a linear classifier."""
        super().__init__()
        self.embedding_dim, self.num_classes, self.encoder = embedding_dim, num_classes, encoder
        self.projection_head: nn.Module = nn.Identity()
        self.bottleneck: nn.Module = nn.Identity()
        self.classifier: nn.Module = nn.Linear(embedding_dim, num_classes)
        self.projector: nn.Module = nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        """Return the input of the bottleneck, which is the embedding if there is none."""
        return self.projection_head(self.encoder(images))

    def embed(self, images: Tensor) -> Tensor:
        """Images float (B, 3, H, W) in [-1, 1] -> embeddings (B, embedding_dim)."""
        return self.bottleneck(self.features(images))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images float (B, 3, H, W) in [-1, 1] -> embeddings (B, embedding_dim) and logits (B, num_classes)."""
        embeddings = self.embed(images)
        return embeddings, self.classifier(embeddings)


def build(
    settings: EncoderSettings,
    num_classes: int,
    seed: int,
    guidance_dim: int | None = None,  # length of the guidance targets; None for methods without guidance
    projection_dim: int | None = None,  # length of MOON's projection head (linear, ReLU, linear; the paper: 256)
    latent_dim: int | None = None,  # length of FedCR's Gaussian bottleneck
    cosine_scale: float | None = None,  # initial factor of FedNH's cosine classifier; None for a linear classifier
    simsiam_dim: int | None = None,  # length of SimSiam's projection, whose heads then take the classifier's place
) -> FLModel:
    """Build a model with weights drawn for this seed."""
    with seeding.scoped_global_torch_seed(seed, "model"):
        encoder = Encoder(settings)
        embedding_dim = encoder.embedding_dim
        model = FLModel(encoder, embedding_dim, num_classes)
    if projection_dim:
        with seeding.scoped_global_torch_seed(seed, "projection head"):
            first = nn.Linear(embedding_dim, embedding_dim)
            model.projection_head = nn.Sequential(first, nn.ReLU(), nn.Linear(embedding_dim, projection_dim))
        embedding_dim = projection_dim
    if latent_dim:
        with seeding.scoped_global_torch_seed(seed, "bottleneck"):
            model.bottleneck = GaussianBottleneck(embedding_dim, latent_dim)
        embedding_dim = latent_dim
    if embedding_dim != model.embedding_dim or cosine_scale:
        with seeding.scoped_global_torch_seed(seed, "classifier"):
            sizes = embedding_dim, num_classes
            model.classifier = CosineClassifier(*sizes, cosine_scale) if cosine_scale else nn.Linear(*sizes)
        model.embedding_dim = embedding_dim
    if simsiam_dim:
        with seeding.scoped_global_torch_seed(seed, "simsiam heads"):
            norm_layer = BatchNorm1d if settings.normalisation == "batch" else nn.LayerNorm
            model.classifier = SimSiamHeads(embedding_dim, simsiam_dim, norm_layer)
    if guidance_dim not in (None, embedding_dim):
        with seeding.scoped_global_torch_seed(seed, "projector"):
            model.projector = nn.Linear(embedding_dim, guidance_dim)
    return model
