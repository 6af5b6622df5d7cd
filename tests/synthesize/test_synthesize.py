"""Generated images: their content, resuming, and balancing clients with them."""

import json

import numpy as np
import pytest
import torch

from pipeline.data.datasets import PreparedDataset
from pipeline.errors import PipelineError
from pipeline.settings import config
from stages import synthesize
from stages.synthesize.generate import Generator
from stages.train_fl import run as train
from stages.train_fl.synthetic import top_up
from tests.conftest import write_params

GENERATE = {"synthesize.images_per_class": 2, "synthesize.num_inference_steps": 6}


@pytest.fixture(scope="module")
def project(extracted, tmp_path_factory):
    """A separate project with the data and model of `extracted`."""
    root = tmp_path_factory.mktemp("synthesize")
    write_params(root, GENERATE)
    (root / "models").symlink_to(extracted / "models")
    for part in ("datasets/digits", "backbones", "features"):
        link = root / "data" / part
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(extracted / "data" / part)
    return root


def load(root, **changes):
    return config.load(root / "params.yaml", {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def generated(project):
    return PreparedDataset(synthesize.run(load(project)))


def test_every_class_has_its_own_images(generated, project):
    images = generated.load("train")
    assert images.images.shape == (20, 32, 32, 3)
    assert np.bincount(images.labels).tolist() == [2] * 10
    # nearest class mean of the real images, pixel by pixel: chance is 2 of 20
    real = PreparedDataset(load(project).dataset_dir).load("train")
    means = np.stack([real.images[real.labels == k].mean(0).ravel() for k in range(10)])
    flat = images.images.reshape(20, -1).astype(float)
    nearest = np.argmax(np.corrcoef(flat, means)[:20, 20:], 1)
    assert (nearest == images.labels).sum() >= 8


def test_an_image_depends_on_neither_batch_nor_count(generated, project):
    made = load(project)
    generator = Generator(made.backbone_dir, made.params.synthesize, 32, 1, "cpu")
    alone = generator(4, "handwritten number 4", 1)
    assert np.abs(alone[0].astype(int) - generated.load("train").images[8]).max() <= 1  # rounding


def test_a_killed_generation_resumes_without_repeating_a_class(generated, project, monkeypatch):
    expected = generated.load("train").images
    made = []
    original = Generator.__call__

    def counted(self, label, class_name, count):
        made.append(label)
        if made.count(7) == 1 and label == 7:
            raise KeyboardInterrupt
        return original(self, label, class_name, count)

    monkeypatch.setattr(Generator, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        synthesize.run(load(project))
    resumed = PreparedDataset(synthesize.run(load(project)))
    assert made == [*range(8), 7, 8, 9]
    assert np.array_equal(resumed.load("train").images, expected)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("dtype", "remedy"), [("float16", "Set synthesize.dtype to float32"), ("float32", "Check its")]
)
def test_images_that_are_not_finite_are_rejected(project, value, dtype, remedy):
    made = load(project, synthesize__dtype=dtype)
    generator = Generator(made.backbone_dir, made.params.synthesize, 32, 2, "cpu")
    with torch.no_grad():
        generator._pipe.vae.decoder.conv_out.bias[0] = float(value)
    with pytest.raises(PipelineError, match=f"images of 'a' that are not finite in {dtype}. {remedy}"):
        generator(0, "a", 1)


@pytest.mark.parametrize("steps", [1000, 1001])  # of 1000 with an offset of one, the first would be timestep 1000
def test_more_steps_than_the_schedule_has_are_rejected(project, steps):
    made = load(project, synthesize__num_inference_steps=steps)
    with pytest.raises(PipelineError, match=f"num_inference_steps = {steps}: the noise schedule of tiny-sd has 1000"):
        Generator(made.backbone_dir, made.params.synthesize, 32, 1, "cpu")


def test_clients_are_topped_up_to_their_mean(generated, project):
    balanced = load(project, train_fl__balance_with_synthetic="mean", train_fl__num_rounds=1)
    partition = json.loads((train(balanced, "fedavg", "dir05", 0) / "partition.json").read_text())
    for own, extra in zip(partition["label_counts"], partition["synthetic_counts"], strict=True):
        target = -(-sum(own) // 10)
        assert extra == [min(2, max(0, target - count)) for count in own]  # two images of a class are there


def test_top_up_by_hand():
    labels = np.repeat([0, 1, 2], 10)
    rng = np.random.default_rng
    mean = top_up(np.array([7, 0, 1]), labels, "mean", rng(0))  # 8 / 3 -> 3
    assert np.bincount(labels[mean], minlength=3).tolist() == [0, 3, 2]
    largest = top_up(np.array([7, 0, 1]), labels, "largest", rng(0))
    assert np.bincount(labels[largest], minlength=3).tolist() == [0, 7, 6]
    assert len(set(largest)) == 13
    assert len(top_up(np.zeros(3, int), labels, "largest", rng(0))) == 0


def test_guided_methods_and_missing_images_are_rejected(project):
    with pytest.raises(PipelineError, match="have no cached representations"):
        train(load(project, train_fl__balance_with_synthetic="mean"), "feddifrc", "dir05", 0)
    none = load(project, train_fl__balance_with_synthetic="mean", synthesize__images_per_class=0)
    synthesize.run(none)
    with pytest.raises(PipelineError, match="Set synthesize.images_per_class above 0"):
        train(none, "fedavg", "dir05", 0)


def test_out_of_memory_halves_the_batch_and_gives_the_same_images(project, monkeypatch, caplog):
    made = load(project, synthesize__num_inference_steps=2)

    def generate(batch_size: int, fitting: int) -> np.ndarray:
        generator = Generator(made.backbone_dir, made.params.synthesize, 32, batch_size, "cpu")
        whole = Generator._batch

        def batch(self, label, class_name, numbers):
            if len(numbers) > fitting:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(self, label, class_name, numbers)

        monkeypatch.setattr(Generator, "_batch", batch)
        try:
            return generator(0, "a", 5)
        finally:
            monkeypatch.setattr(Generator, "_batch", whole)

    assert np.array_equal(generate(4, 1), generate(1, 1))
    assert [record.message for record in caplog.records] == [
        "Out of memory with batches of 4 images; continuing with 2.",
        "Out of memory with batches of 2 images; continuing with 1.",
    ]
    with pytest.raises(PipelineError, match="Not even one image at a time fits into memory"):
        generate(4, 0)
