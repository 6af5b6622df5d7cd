"""The clients' networks. Each maps images to an embedding and the embedding to logits.

Guidance acts on the embedding. Where its length differs from that of the cached representations, a linear projector
stands between them; it is drawn from its own generator, so the rest of the network starts equal with or without it.
"""

from typing import Literal

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from pipeline import seeding

ModelName = Literal["small_cnn", "resnet10"]


class FLModel(nn.Module):
    """An encoder, a linear classifier on its embedding, and a projector to the space of the guidance."""

    def __init__(self, encoder: nn.Module, embedding_dim: int, num_classes: int) -> None:
        """Joins an encoder, images -> (B, embedding_dim), to a classifier."""
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(embedding_dim, num_classes)
        self.projector: nn.Module = nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images float (B, 3, H, W) in [-1, 1] -> what guidance sees (B, D) and logits (B, num_classes)."""
        embedding = self.encoder(images)
        return self.projector(embedding), self.classifier(embedding)


def build(name: ModelName, num_classes: int, seed: int, guidance_dim: int | None = None) -> FLModel:
    """A model with weights drawn for this seed.

    Args:
        name: "small_cnn" (embedding 144, the length of tiny-sd's representations) or "resnet10" (512, as in the paper,
            the length of Stable Diffusion's).
        num_classes: length of the logits.
        seed: of the initial weights.
        guidance_dim: D of the cached representations; None for methods that use none.
    """
    encoder, embedding_dim = _ENCODERS[name]
    with seeding.scoped_global_torch_seed(seed, "model"):
        model = FLModel(encoder(), embedding_dim, num_classes)
    if guidance_dim not in (None, embedding_dim):
        with seeding.scoped_global_torch_seed(seed, "projector"):
            model.projector = nn.Linear(embedding_dim, guidance_dim)
    return model


def _small_cnn() -> nn.Module:
    """Three convolutions with ReLU and pooling, then a linear embedding: 0.2 million parameters at any image size."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 144),
    )


def _resnet10() -> nn.Module:
    """ResNet-10 (one basic block a stage) with the CIFAR stem: a 3x3 first convolution and no max pooling."""
    resnet = ResNet(BasicBlock, [1, 1, 1, 1])
    resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()
    resnet.fc = nn.Identity()
    return resnet


_ENCODERS = {"small_cnn": (_small_cnn, 144), "resnet10": (_resnet10, 512)}
