"""Every family's features on a GPU that is not there, in three dtypes: devices, dtypes and traffic of a batch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.datasets import Images
from pipeline.diffusion.prompts import PromptSet
from pipeline.diffusion.representation import Projector
from pipeline.diffusion.session import FrozenSession
from pipeline.feature_store import LayerBasis
from pipeline.settings.params import ExtractFeatures, Runtime
from stages.extract_features.extraction import Extraction
from tests.extract_features import tiny_models
from tests.extract_features.fixtures import section
from tests.pretended_gpu import on_gpu, pretended

COUNT, SIDE, DIMS = 6, 64, 4
TEXTS = {"dit": ["goldfish", "tench"]}
GENERIC = {"dit": "cock"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name) for name, make in tiny_models.FAMILIES.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
def test_a_batch_of_features_stays_on_the_gpu(monkeypatch, models, family, dtype):
    generic = GENERIC.get(family, "")
    settings = section(ExtractFeatures, "extract_features", image_size=SIDE, dtype=dtype, denoise_prompt=generic)
    runtime = section(Runtime, "runtime", device="cpu", unet_batch_size=4)
    prompts = PromptSet([[text] for text in TEXTS.get(family, ["a cat", "a dog"])], "label")
    session = FrozenSession(models[family], "auto", prompts, settings, runtime, "cpu")
    pixels = np.zeros((COUNT, SIDE, SIDE, 3), np.uint8)
    extraction = Extraction(session, Images.of_one_domain(pixels, np.zeros(COUNT, np.int64)), settings)
    backbone = session.backbone
    bases = {
        layer: LayerBasis(np.zeros(channels), np.zeros((DIMS, channels)), np.ones(DIMS), 1.0)
        for layer, channels in backbone.channels.items()
    }
    host = extraction.host_input(np.arange(COUNT))
    with pretended(monkeypatch, backbone._model, backbone._vae) as traffic:
        backbone.device = "cuda"
        conditioning = session.model.conditioning
        for name, value in conditioning.tensors.items():
            conditioning.tensors[name] = on_gpu(value)
        projector = Projector(bases, "cuda")
        latents = backbone.encode_images(host.images, SIDE)
        inputs = extraction.inputs(host, latents)
        assert inputs.noisy.is_cuda and inputs.noisy.dtype == torch.float32
        traffic.counts.clear()
        image, text = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 0])
        maps = extraction.maps(inputs, image, text)
        values = projector(maps)
    assert all(of_layer.is_cuda and of_layer.dtype == torch.float32 for of_layer in maps.values())
    assert values.is_cuda and values.shape == (4, 3 * DIMS) and values.dtype == torch.float32
    assert traffic.counts["waits"] == 1  # whether all maps are finite
    # The rows of the images, and of the prompts once per tensor of a prompt.
    assert traffic.counts["to gpu"] == 1 + len(conditioning.tensors)
    assert "to gpu, waiting" not in traffic.counts
