"""The encoders of the clients' networks: images float (B, 3, H, W) in [-1, 1] -> embeddings (B, embedding_dim)."""

from collections.abc import Callable
from typing import Literal

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

EncoderName = Literal["small_cnn", "resnet10"]


def small_cnn() -> nn.Module:
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


def resnet10() -> nn.Module:
    """ResNet-10 (one basic block a stage) with the CIFAR stem: a 3x3 first convolution and no max pooling."""
    resnet = ResNet(BasicBlock, [1, 1, 1, 1])
    resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()
    resnet.fc = nn.Identity()
    return resnet


ENCODERS: dict[EncoderName, tuple[Callable[[], nn.Module], int]] = {
    "small_cnn": (small_cnn, 144),
    "resnet10": (resnet10, 512),
}
"""Name -> (constructor, embedding_dim)."""
