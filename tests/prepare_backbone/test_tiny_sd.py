"""tiny-sd: the shipped weights and the training that makes them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from pipeline import seeding
from stages.prepare_backbone import rendered_digits, tiny_sd
from stages.prepare_backbone.training.trainer import Machine, Trainer

SHIPPED = Path(tiny_sd.__file__).parent / "tiny-sd"
SHORT = tiny_sd.RECIPE.model_copy(update={"batch_size": 4, "autoencoder_steps": 2, "denoiser_steps": 2})


def weights(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def test_training_is_seeded_and_writes_the_shipped_files(tmp_path):
    for name in "ab":
        trainer = Trainer(tiny_sd.images(40), SHORT, Machine("cpu"))
        trainer.train()
        trainer.save(tmp_path / name)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a").keys() == weights(SHIPPED).keys()
    for name in weights(SHIPPED):
        with safe_open(tmp_path / "a" / name, "pt") as new, safe_open(SHIPPED / name, "pt") as shipped:
            shapes = [{key: f.get_slice(key).get_shape() for key in f.keys()} for f in (new, shipped)]
        assert shapes[0] == shapes[1]
    tokenizers = [
        json.loads((folder / "tokenizer" / "tokenizer.json").read_text()) for folder in (tmp_path / "a", SHIPPED)
    ]
    assert set(tokenizers[0]["model"]["vocab"]) == set(tokenizers[1]["model"]["vocab"])


def test_the_shipped_model_is_small_and_in_half_precision():
    assert sum(len(data) for data in weights(SHIPPED).values()) < 6_000_000
    with safe_open(SHIPPED / "unet" / "diffusion_pytorch_model.safetensors", "pt") as unet:
        assert {unet.get_tensor(key).dtype for key in unet.keys()} == {torch.float16}


def test_the_corpus_is_seeded_and_holds_white_digits_on_black():
    pairs = [list(rendered_digits.render_digits(20, seeding.numpy_generator(0, "x"))) for _ in range(2)]
    for (a, digit_a), (b, digit_b) in zip(*pairs, strict=True):
        assert np.array_equal(a, b) and digit_a == digit_b
        assert a.shape == (32, 32, 3) and a.dtype == np.uint8
    mean = np.mean([image for image, _ in pairs[0]], axis=0)
    assert mean[[0, -1]].mean() < 40 < 80 < mean[8:24, 8:24].mean()


@pytest.mark.parametrize("digits", [(0, 1), (4, 7)])
def test_shipped_model_draws_the_prompted_digit(digits):
    """Images generated for a prompt are nearer to the corpus' mean image of that digit than to the other digit's."""
    pairs = list(rendered_digits.render_digits(400, seeding.numpy_generator(1, "x")))
    means = [np.mean([image for image, digit in pairs if digit == wanted], axis=0) for wanted in digits]
    pipe = StableDiffusionPipeline.from_pretrained(SHIPPED, use_safetensors=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for own, wanted in enumerate(digits):
        prompt = f"a photo of a {rendered_digits.CLASS_NAMES[wanted]}"
        made = pipe(
            [prompt] * 8, height=32, width=32, num_inference_steps=10, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        image = 255 * made.mean(0)
        distance = [np.square(image - mean).mean() for mean in means]
        assert distance[own] < distance[1 - own]
