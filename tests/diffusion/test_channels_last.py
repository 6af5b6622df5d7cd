"""GroupNorm and transformer blocks that keep the channels-last layout; their kernels run in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from diffusers import Transformer2DModel
from torch import nn

from pipeline.diffusion import channels_last
from tests.conftest import REPOSITORY

# Columns: samples, channels, height, width, groups, mean of the values, dtype, largest relative error.
CODE = """
import torch
from torch.nn import functional
from pipeline.diffusion import channels_last
generator = torch.Generator().manual_seed(0)
for samples, channels, height, width, groups, mean, dtype, error in (
    (2, 24, 5, 7, 4, 0.0, torch.float32, 1e-6),        # less than a tile
    (1, 130, 34, 33, 2, 3.0, torch.float32, 1e-6),     # several tiles of channels, two chunks of positions
    (3, 80, 4, 4, 8, 1000.0, torch.float32, 1e-3),     # far from zero, where torch's own error is 5e-2
    (2, 96, 8, 8, 32, 1.0, torch.bfloat16, 1e-2),
    (1, 64, 1, 1, 8, 0.0, torch.float32, 1e-6),        # one position
):
    maps = (torch.randn(samples, channels, height, width, generator=generator) + mean).to(dtype)
    maps = maps.contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(channels, generator=generator).to(dtype) for _ in range(2))
    found = channels_last.group_norm(maps, groups, weight, bias, 1e-5)
    exact = functional.group_norm(maps.double(), groups, weight.double(), bias.double(), 1e-5)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    assert (found.double() - exact).norm() <= error * exact.norm(), (channels, (found.double() - exact).norm())
"""


def test_group_norm_is_torchs_group_norm():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("linear", [False, True])
def test_adapted_transformer_gives_the_same_bytes_on_a_cpu_and_keeps_the_layout(linear):
    pytest.importorskip("triton")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = Transformer2DModel(2, 8, in_channels=16, norm_num_groups=4, use_linear_projection=linear).eval()
    maps = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    maps = maps.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        before = block(maps, return_dict=False)[0]
        channels_last.adapt(block)
        after = block(maps, return_dict=False)[0]
    assert torch.equal(before, after)
    assert after.is_contiguous(memory_format=torch.channels_last)
    assert type(block.norm) is channels_last.ChannelsLastGroupNorm


def test_adapted_layer_shares_its_parameters():
    network = nn.Sequential(nn.GroupNorm(2, 4), nn.GroupNorm(2, 4, affine=False))
    weight = network[0].weight
    channels_last.adapt(network)
    if type(network[0]) is channels_last.ChannelsLastGroupNorm:
        assert network[0].weight is weight
    assert type(network[1]) is nn.GroupNorm
