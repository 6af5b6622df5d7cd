"""A sample run through a tiny real model: one pass per image and timestep, equal to a loop of single passes."""

import json

import numpy as np
import pytest
import torch

from pipeline.data.datasets import PreparedDataset
from pipeline.diffusion import backbones, noise, prompts
from pipeline.diffusion.backbones.base import Backbone
from pipeline.diffusion.session import FrozenSession
from pipeline.errors import PipelineError
from pipeline.feature_store import LayerBasis
from pipeline.settings import config as configuration
from stages.analyze_features.probes import ProbeEvaluator
from stages.analyze_features.sweep.run import score_layers
from stages.analyze_features.sweep.sample import Sample, as_colours, fewest_dims
from tests.conftest import invoke
from tests.extract_features import tiny_models
from tests.extract_features.fixtures import extract, project

LAYERS = ["up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3"]
SWEEP = {
    "sweep_features.basis_images": 10,
    "sweep_features.margin_images": 5,
    "sweep_features.explained_variance": 0.9,
    "runtime.device": "cpu",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny").mkdir()
    return project(folder / "p", source=tiny_models.sd(folder / "tiny"), image_size=64, negatives=1, dims=[8, 8, 8])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Digits with tiny-sd, whose features depend on the prompt."""
    return project(tmp_path_factory.mktemp("digits") / "p", negatives=1)


def sample(root, index, **changes):
    config = configuration.load(root / "params.yaml", SWEEP | changes)
    dataset = PreparedDataset(config.dataset_dir)
    prompt_set = prompts.build(config.params.extract_features, dataset.class_names, config.path)
    settings, runtime = config.params.extract_features, config.params.runtime
    session = FrozenSession(config.backbone_dir, "all", prompt_set, settings, runtime, "cpu")
    return Sample(session, config.params.sweep_features, prompt_set, dataset.load("train"), index)


@pytest.fixture(scope="module")
def swept(root):
    """Run the sweep command; return its output, and the images of every encoding (timestep None) and every pass."""
    seen = []
    denoise, encode = Backbone.features, Backbone.encode_images

    def features(self, noisy, timestep, conditioning):
        seen.append((timestep, len(noisy)))
        maps = denoise(self, noisy, timestep, conditioning)
        assert list(maps) == LAYERS
        return maps

    def encode_images(self, images, image_size):
        seen.append((None, len(images)))
        return encode(self, images, image_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "features", features)
        patch.setattr(Backbone, "encode_images", encode_images)
        invoked = invoke(
            root, "sweep-features", "--timesteps", "[600, 100]", "--images", "32", "--basis-images", "10",
            "--margin-images", "12", "--picture-images", "1",
            "--set", "runtime.unet_batch_size=8", "--set", "analyze_features.splits=1",
        )  # fmt: skip
    assert invoked.exit_code == 0, invoked.output
    return invoked.output, seen


def test_the_sweep_runs_each_pair_once_per_timestep_and_encodes_each_image_once(swept):
    _, passes = swept
    assert sum(count for timestep, count in passes if timestep is None) == 32
    batches = (32 + 12 * 2) // 8  # every image, and 12 of them under two prompts each
    assert sorted(entry for entry in passes if entry[0] is not None) == [(100, 8)] * batches + [(600, 8)] * batches


def test_the_table_has_every_layer_and_their_fusions_at_every_timestep(root, swept):
    folder = root / "analysis" / "sweep"
    assert {file.suffix for file in folder.iterdir()} == {".csv", ".json", ".svg", ".png", ".yaml"}
    table = json.loads((folder / "sweep.json").read_text())
    for timestep in (100, 600):
        sets = [row["layers"] for row in table["rows"] if row["timestep"] == timestep]
        assert sets[:4] == [[layer] for layer in LAYERS]
        assert LAYERS in sets and LAYERS[1:] in sets
    assert {"margin", "hardest_margin", "matching_nearest", "separation"} < set(table["rows"][0])
    assert table["chance"]["matching_nearest"] == 0.5
    for choice in ("recommended", "by_probe", "by_prompts"):
        assert table[choice] in table["rows"]
    assert len((folder / "sweep.csv").read_text().splitlines()) == 1 + len(table["rows"])


def energies(vectors, mean, components):
    return [np.linalg.norm((vectors - mean) @ component) for component in components]


def test_representations_equal_those_of_single_passes(digits):
    index = np.array([30, 3, 17, 5, 8, 39, 1, 22, 11, 12, 13, 2])
    found = sample(digits, index).represent(300, lambda done: None)
    config = configuration.load(digits / "params.yaml")
    backbone = backbones.load(config.backbone_dir, LAYERS, "cpu", torch.float32)
    images, prompt = PreparedDataset(config.dataset_dir).load("train").images, backbone.encode_prompts([""])
    maps, bases = {layer: [] for layer in LAYERS}, {}
    for image in index:
        latents = backbone.encode_images(images[[image]], 32)
        noisy = backbone.add_noise(latents, noise.draw(latents.shape[1:], 0, np.array([image])), 300)
        for layer, of_image in backbone.features(noisy, 300, prompt).items():
            maps[layer].append(of_image[0].flatten(1).T.double().numpy())  # (h*w, C)
    for layer in LAYERS:
        vectors = np.concatenate(maps[layer][:10])
        _, singular, components = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
        share = np.cumsum(singular**2) / np.sum(singular**2)
        dims = next(count for count in range(1, 1 + len(share)) if share[count - 1] >= 0.9)
        bases[layer] = vectors.mean(0), components[:dims]
        expected = [energies(of_image, *bases[layer]) for of_image in maps[layer]]
        np.testing.assert_allclose(found[layer].values, expected, rtol=1e-3, atol=1e-3)
        assert found[layer].explained_variance == pytest.approx(share[dims - 1], abs=1e-4)
    for row, image in enumerate(index[:5]):
        own = images_prompts(config, backbone, image)
        latents = backbone.encode_images(images[[image]], 32)
        noisy = backbone.add_noise(latents, noise.draw(latents.shape[1:], 0, np.array([image])), 300)
        for column, text in enumerate(own):
            for layer, of_image in backbone.features(noisy, 300, backbone.encode_prompts([text])).items():
                expected = energies(of_image[0].flatten(1).T.double().numpy(), *bases[layer])
                np.testing.assert_allclose(found[layer].prompted[row, column], expected, rtol=1e-3, atol=1e-3)


def images_prompts(config, backbone, image):
    """Return the image's own prompt, and the one with the nearest text embedding (`negatives` is 1)."""
    dataset = PreparedDataset(config.dataset_dir)
    texts = [f"a photo of a {name}" for name in dataset.class_names]
    embeddings = backbone.encode_prompts(texts).similarity.numpy()
    own = int(dataset.load("train").labels[image])
    cosine = [one @ embeddings[own] / np.linalg.norm(one) for one in embeddings]
    cosine[own] = -np.inf
    return [texts[own], texts[int(np.argmax(cosine))]]


def test_without_margin_images_there_are_no_prompted_passes_or_margins(root):
    few, passes = sample(root, np.arange(12), **{"sweep_features.margin_images": 0}), []
    found = few.represent(300, passes.append)
    assert sum(passes) == 12
    assert found[LAYERS[0]].prompted.shape[:2] == (0, 2)
    config = configuration.load(root / "params.yaml")
    evaluator = ProbeEvaluator(np.arange(12) % 2, config.params.analyze_features)
    candidates = score_layers(evaluator, few.positive, 300, found, LAYERS)
    assert [candidate.margins for candidate in candidates] == [{}] * len(candidates)


def test_the_margin_is_that_of_the_images_own_prompts(root):
    """Compare with loops over the sample; `positive` names the matching prompt."""
    index = np.arange(12)
    few = sample(root, index)
    assert few.positive.tolist() == [0] * 5  # few negatives: the matching prompt comes first
    found = few.represent(300, lambda done: None)
    config = configuration.load(root / "params.yaml")
    labels = PreparedDataset(config.dataset_dir).load("train").labels[index]
    candidates = score_layers(
        ProbeEvaluator(labels, config.params.analyze_features), few.positive, 300, found, LAYERS[1:]
    )
    (fused,) = [candidate for candidate in candidates if candidate.layers == LAYERS[1:]]

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    margins = []
    for image in range(5):
        denoised = np.concatenate([found[layer].values[image] for layer in LAYERS[1:]]).astype(float)
        own, other = (
            np.concatenate([found[layer].prompted[image, prompt] for layer in LAYERS[1:]]).astype(float)
            for prompt in (0, 1)
        )
        margins.append(cosine(denoised, own) - cosine(denoised, other))
    assert fused.margins["margin"] == pytest.approx(np.mean(margins), abs=1e-6)
    assert fused.margins["matching_nearest"] == np.mean(np.array(margins) > 0)


def test_batch_size_does_not_change_numbers_and_few_images_are_enough(root):
    index = np.arange(7)  # fewer than basis_images
    one, other = (
        sample(root, index, **{"runtime.unet_batch_size": size}).represent(500, lambda done: None) for size in (7, 3)
    )
    for layer in LAYERS:
        np.testing.assert_allclose(one[layer].values, other[layer].values, rtol=1e-3, atol=1e-4)


def test_more_pictures_than_basis_images_are_drawn(root):
    changes = {"sweep_features.basis_images": 2, "sweep_features.picture_images": 7, "runtime.unet_batch_size": 3}
    found = sample(root, np.arange(8), **changes).represent(300, lambda done: None)
    assert {len(layer.colours) for layer in found.values()} == {7}


def test_dims_are_capped(root):
    found = sample(root, np.arange(6), **{"sweep_features.max_dims": 2}).represent(300, lambda done: None)
    assert [layer.values.shape for layer in found.values()] == [(6, 2)] * 4


def test_an_overflow_is_reported(root, monkeypatch):
    add_noise = Backbone.add_noise
    monkeypatch.setattr(Backbone, "add_noise", lambda self, *arguments: add_noise(self, *arguments) * float("inf"))
    with pytest.raises(
        PipelineError, match="up_blocks.0 of the frozen model is not finite at timestep 300, even in float32"
    ):
        sample(root, np.arange(3)).represent(300, lambda done: None)


def basis(*variance):
    size = len(variance)
    return LayerBasis(np.zeros(size), np.eye(size), np.array(variance, float), float(sum(variance)))


def test_the_fewest_dims_that_explain_a_share():
    of_ten = basis(5, 3, 1, 1)
    assert [fewest_dims(of_ten, share) for share in (0.1, 0.5, 0.51, 0.8, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert fewest_dims(basis(0, 0), 0.9) in (1, 2)


def test_colours_span_their_range_over_all_images():
    maps = torch.zeros(2, 2, 1, 2)
    maps[1, 0, 0, 1] = 4.0  # one position of the second image, on the first component
    colours = as_colours(maps, basis(1, 1))
    assert colours.shape == (2, 1, 2, 3)
    assert colours[1, 0, 1].tolist() == [255, 0, 0]
    assert colours.sum() == 255
    assert as_colours(maps[:0], basis(1, 1)).shape == (0, 1, 2, 3)


def test_the_recommendation_is_a_preset_that_can_be_extracted(root, swept):
    preset = swept[0].splitlines()[-1]
    assert "by the prompts alone: t = " in swept[0]
    before = (root / "params.yaml").read_bytes()
    try:
        applied = invoke(root, "preset", preset)
        assert applied.exit_code == 0, applied.output
        chosen = configuration.load(root / "params.yaml").params.extract_features
        assert chosen.timestep in (100, 600) and len(chosen.layers) == len(chosen.dims)
        assert extract(root).name == f"digits-tiny-t{chosen.timestep}"
    finally:
        (root / "params.yaml").write_bytes(before)
