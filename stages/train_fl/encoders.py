"""The encoders of the clients' networks: images float (B, 3, H, W) in [-1, 1] -> embeddings (B, embedding_dim).

small_cnn      144 dims, the length of tiny-sd's representations; no normalisation layers
resnet10, 18   512 dims, the paper's ResNet with the CIFAR stem (He et al., CVPR 2016)
mobilenet_v2   512 dims, the last 1x1 convolution narrowed from 1280 as the authors do for fine-grained data (Sandler
               et al., CVPR 2018); its first two strides are 1, for images of 32 to 64 pixels

torchvision, which takes as long to load as torch, is imported only for the encoders that use it. "group" replaces every
BatchNorm by GroupNorm (Hsieh et al., ICML 2020, who find BatchNorm at fault on skewed clients), with the greatest
common divisor of 32 and the number of channels as the number of groups.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

EncoderName = Literal["small_cnn", "resnet10", "resnet18", "mobilenet_v2"]
NormLayer = Callable[[int], nn.Module]


@dataclass(frozen=True)
class EncoderSettings:
    """Which encoder, its normalisation layers, and how it computes."""

    name: EncoderName
    normalisation: Literal["batch", "group"]
    precision: Literal["float32", "tf32", "bfloat16"]
    channels_last: bool


def is_channels_last_faster(name: EncoderName, normalisation: str, device: str) -> bool:
    """Return whether a network's steps are faster in the channels-last memory format.

    All are but those with GroupNorm on a CPU, where that layer of torch is slow in it. The small CNN has none.
    """
    return device != "cpu" or normalisation == "batch" or name == "small_cnn"


class Encoder(nn.Module):
    """A network, the length of its embedding, and the precision and memory format it computes in."""

    def __init__(self, settings: EncoderSettings) -> None:
        """Draw the weights from torch's global generator."""
        super().__init__()
        construct, self.embedding_dim = _ENCODERS[settings.name]
        self.network = construct(BatchNorm2d if settings.normalisation == "batch" else _group_norm)
        self._bfloat16 = settings.precision == "bfloat16"
        self._memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        if settings.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Images float32 (B, 3, H, W) -> embeddings float32 (B, embedding_dim)."""
        images = images.contiguous(memory_format=self._memory_format)  # all layers keep the images' format
        if not self._bfloat16:
            return self.network(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.network(images).float()


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm that also trains where a batch has one value per channel: one image on a 1x1 map.

    Such a batch has no variance, and torch rejects it. It is normalised by the running statistics, as in evaluation,
    and leaves them unchanged.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        if self.training and input.numel() == input.shape[1]:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Of vectors (B, C)."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Of maps (B, C, H, W)."""


class _AveragePool(nn.Module):
    """Average pooling to a square; where the sides divide, by the ordinary one: only its gradient is deterministic."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self._side = side

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[-2:]
        if height == width and height % self._side == 0:
            return functional.avg_pool2d(maps, height // self._side)
        return functional.adaptive_avg_pool2d(maps, self._side)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _small_cnn(norm_layer: NormLayer) -> nn.Module:
    """Build three convolutions with ReLU and pooling, and a linear embedding: 0.2 million parameters."""
    # Pooling before ReLU gives the same values and gradients as after it, on a quarter of the numbers.
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), _AveragePool(4),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 144),
    )  # fmt: skip


def _resnet(blocks_per_stage: int) -> Callable[[NormLayer], nn.Module]:
    """Return a builder of basic blocks behind the CIFAR stem: a 3x3 first convolution and no max pooling."""

    def construct(norm_layer: NormLayer) -> nn.Module:
        from torchvision.models.resnet import BasicBlock, ResNet

        resnet = ResNet(BasicBlock, [blocks_per_stage] * 4, norm_layer=norm_layer)
        resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
        resnet.maxpool = nn.Identity()
        resnet.fc = nn.Identity()
        return resnet

    return construct


def _mobilenet_v2(norm_layer: NormLayer) -> nn.Module:
    """Build MobileNetV2's features at strides for small images, pooled."""
    from torchvision.models.mobilenetv2 import MobileNetV2
    from torchvision.ops import Conv2dNormActivation

    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    features = MobileNetV2(inverted_residual_setting=stages, norm_layer=norm_layer).features
    features[0][0].stride = (1, 1)
    features[-1] = Conv2dNormActivation(320, 512, 1, norm_layer=norm_layer, activation_layer=nn.ReLU6)
    nn.init.kaiming_normal_(features[-1][0].weight, mode="fan_out")
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten())


_ENCODERS: dict[EncoderName, tuple[Callable[[NormLayer], nn.Module], int]] = {
    "small_cnn": (_small_cnn, 144),
    "resnet10": (_resnet(1), 512),
    "resnet18": (_resnet(2), 512),
    "mobilenet_v2": (_mobilenet_v2, 512),
}
"""Name -> (constructor, embedding_dim)."""
