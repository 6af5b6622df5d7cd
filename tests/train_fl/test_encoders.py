"""The encoders: embeddings, normalisation, and batches of one."""

import pytest
import torch
from torch import nn

from pipeline.settings import config
from stages.train_fl import session
from stages.train_fl.encoders import BatchNorm2d, Encoder, EncoderSettings
from stages.train_fl.methods import FedAvg
from tests.conftest import write_params


def make(name, normalisation="batch", precision="float32", channels_last=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder(EncoderSettings(name, normalisation, precision, channels_last))


@pytest.mark.parametrize(
    "name, dims", [("small_cnn", 144), ("resnet10", 512), ("resnet18", 512), ("mobilenet_v2", 512)]
)
def test_batch_of_one_gives_an_embedding(name, dims):
    encoder = make(name).train()
    assert encoder.embedding_dim == dims
    out = encoder(torch.randn(1, 3, 8, 8))  # the last map of a residual network is then 1x1
    assert out.shape == (1, dims) and out.isfinite().all()


def test_depths_equal_the_papers():
    def convolutions(name):
        return sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in make(name).modules())

    assert convolutions("resnet10") == 9  # 1 + 4 stages of 1 block of 2; the tenth layer is the classifier
    assert convolutions("resnet18") == 17


@pytest.mark.parametrize("name", ["resnet10", "mobilenet_v2"])
def test_group_norm_replaces_every_batch_norm(name):
    kinds = [type(m) for m in make(name, "group").modules()]
    assert not any(issubclass(kind, nn.BatchNorm2d) for kind in kinds)
    assert kinds.count(nn.GroupNorm) == sum(isinstance(m, nn.BatchNorm2d) for m in make(name).modules())


def test_single_value_per_channel_is_normalised_by_running_statistics():
    layer = BatchNorm2d(2).train()
    layer.running_mean.copy_(torch.tensor([1.0, 2.0]))
    layer.running_var.copy_(torch.tensor([4.0, 1.0]))
    out = layer(torch.tensor([3.0, 5.0]).view(1, 2, 1, 1))
    assert out.flatten().tolist() == pytest.approx([1.0, 3.0], abs=1e-4)  # (3 - 1) / 2 and (5 - 2) / 1
    assert layer.running_mean.tolist() == [1.0, 2.0]
    layer(torch.randn(2, 2, 1, 1))
    assert layer.running_mean.tolist() != [1.0, 2.0]


def test_bfloat16_and_channels_last_stay_near_float32():
    images = torch.randn(4, 3, 16, 16)
    exact = make("resnet10")(images)
    assert torch.allclose(make("resnet10", channels_last=True)(images), exact, atol=1e-4)
    rounded = make("resnet10", precision="bfloat16")(images)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.3)


@pytest.mark.parametrize(
    "name, normalisation, asked, is_used",
    [
        ("resnet10", "batch", True, True),
        ("resnet10", "batch", False, False),
        ("resnet10", "group", True, False),  # slower on a CPU
        ("small_cnn", "group", True, True),  # it has no such layers
    ],
)
def test_networks_are_channels_last_where_it_is_faster(tmp_path, name, normalisation, asked, is_used):
    changes = {"train_fl.model": name, "train_fl.normalisation": normalisation}
    params = config.load(write_params(tmp_path, changes)).params.train_fl
    model, _ = session.build(params, FedAvg.Settings(), FedAvg, 3, None, 2, 0, "cpu", channels_last=asked)
    weights = [weight for weight in model.encoder.parameters() if weight.dim() == 4 and weight.shape[2] > 1]
    assert {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights[1:]} == {is_used}
    seen = []
    next(module for module in model.modules() if isinstance(module, nn.ReLU)).register_forward_hook(
        lambda _, inputs, output: seen.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    images = torch.randn(2, 3, 32, 32)
    for format in (torch.contiguous_format, torch.channels_last):  # augmentation may give either
        model(images.contiguous(memory_format=format))
    assert seen == [is_used, is_used]
