"""tiny-sd: a model of Stable Diffusion's architecture that is small enough to ship, and its seeded training.

Latent diffusion (Rombach et al., CVPR 2022) with Stable Diffusion's diffusers classes: an AutoencoderKL (32x32 RGB to
8x8x4 latents), a CLIP text encoder and a UNet2DConditionModel with four up blocks and cross-attention, trained as
text-to-image on the rendered digits of `corpus.py`, not on natural images. First the autoencoder learns to reconstruct;
then the UNet and the text encoder learn together to predict the noise, with one caption in ten empty, so that the
unconditional prompt "" has a meaning.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipeline import seeding
from pipeline.progress import track
from stages.prepare_backbone import rendered_digits as corpus

log = logging.getLogger(__name__)

_PROMPT_WORDS = ("a", "photo", "of", "handwritten", "number", "similar", "visual", "object")
_TEXT_LENGTH = 32


@dataclass(frozen=True)
class Recipe:
    """The sizes and seed of the shipped weights, which the same machine reproduces.

    Learning rates are AdamW's peak, annealed to zero along a half cosine.
    """

    seed: int = 0
    corpus_images: int = 20_000
    vae_steps: int = 1_500
    vae_batch: int = 32
    vae_learning_rate: float = 2e-3
    kl_weight: float = 1e-5  # per latent element, next to the mean squared error per pixel
    unet_steps: int = 4_000
    unet_batch: int = 64
    unet_learning_rate: float = 1.5e-3
    empty_caption_rate: float = 0.1
    ema_decay: float = 0.999


def train(output: Path, recipe: Recipe | None = None) -> None:
    """Train tiny-sd and write it to `output` as a diffusers pipeline directory with float16 safetensors weights.

    The default recipe makes the shipped weights, in about 40 minutes on two CPU cores.
    """
    recipe = recipe or Recipe()
    rng = seeding.numpy_generator(recipe.seed, "tiny-sd", "corpus")
    rendered = corpus.render_digits(recipe.corpus_images, rng)
    pairs = list(track(rendered, "render corpus", recipe.corpus_images))
    images = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2)  # (N, 3, 32, 32) uint8
    digits = torch.tensor([digit for _, digit in pairs])
    generator = seeding.torch_generator(recipe.seed, "tiny-sd", "training")
    with seeding.scoped_global_torch_seed(recipe.seed, "tiny-sd", "weights"):
        pipe = build()
    _train_autoencoder(pipe.vae, images, recipe, generator)
    _train_denoiser(pipe, images, digits, recipe, generator)
    pipe.to(dtype=torch.float16).save_pretrained(output, safe_serialization=True)


def build() -> StableDiffusionPipeline:
    """Return the untrained pipeline, float32, with weights drawn from torch's global generator."""
    tokenizer = _tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=_TEXT_LENGTH, **special,
    ))  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=corpus.IMAGE_SIZE,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 48, 64, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, cross_attention_dim=64, attention_head_dim=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _tokenizer() -> CLIPTokenizer:
    """Return CLIP's byte-level BPE with merges only for the words of our prompts; other words become bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    merges = []
    for word in _PROMPT_WORDS:
        head, *tail = [*word[:-1], word[-1] + "</w>"]
        for symbol in tail:
            if (head, symbol) not in merges:
                merges.append((head, symbol))
                tokens.append(head + symbol)
            head += symbol
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=_TEXT_LENGTH)


def _train_autoencoder(vae: AutoencoderKL, images: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> None:
    optimizer, schedule = _optimizer(vae.parameters(), recipe.vae_learning_rate, recipe.vae_steps)
    for step in track(range(recipe.vae_steps), "train autoencoder", recipe.vae_steps):
        pixels = _to_model_range(images[_draw(images, recipe.vae_batch, generator)])
        posterior = vae.encode(pixels).latent_dist
        reconstruction = vae.decode(posterior.sample(generator=generator)).sample
        loss = functional.mse_loss(reconstruction, pixels) + recipe.kl_weight * posterior.kl().mean()
        _step(loss, optimizer, schedule, vae.parameters())
        if step % 250 == 249:
            log.info("autoencoder step %d: loss %.4f", step + 1, loss.item())
    vae.requires_grad_(False)
    with torch.no_grad():
        latents = vae.encode(_to_model_range(images[:2_000])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))


def _train_denoiser(
    pipe: StableDiffusionPipeline,
    images: torch.Tensor,
    digits: torch.Tensor,
    recipe: Recipe,
    generator: torch.Generator,
) -> None:
    """Train to predict the noise (Ho et al., NeurIPS 2020, eq. 14), with an exponential moving average of weights."""
    captions = [corpus.CAPTION.format(digit=digit) for digit in range(10)] + [""]
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=_TEXT_LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        latents = torch.cat([pipe.vae.encode(_to_model_range(chunk)).latent_dist.mean for chunk in images.split(500)])
    latents = latents * pipe.vae.config.scaling_factor
    learner = torch.nn.ModuleList([pipe.unet, pipe.text_encoder])
    averaged = AveragedModel(learner, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    optimizer, schedule = _optimizer(learner.parameters(), recipe.unet_learning_rate, recipe.unet_steps)
    running = 0.0
    for step in track(range(recipe.unet_steps), "train denoiser", recipe.unet_steps):
        batch = _draw(images, recipe.unet_batch, generator)
        empty = torch.rand(recipe.unet_batch, generator=generator) < recipe.empty_caption_rate
        prompt_embeds = pipe.text_encoder(tokens)[0][torch.where(empty, 10, digits[batch])]
        noise = torch.randn(latents[batch].shape, generator=generator)
        timesteps = torch.randint(pipe.scheduler.config.num_train_timesteps, (recipe.unet_batch,), generator=generator)
        noisy = pipe.scheduler.add_noise(latents[batch], noise, timesteps)
        loss = functional.mse_loss(pipe.unet(noisy, timesteps, prompt_embeds).sample, noise)
        _step(loss, optimizer, schedule, learner.parameters())
        averaged.update_parameters(learner)
        running = loss.item() if step == 0 else 0.99 * running + 0.01 * loss.item()
        if step % 250 == 249:
            log.info("denoiser step %d: loss %.4f", step + 1, running)
    learner.load_state_dict(averaged.module.state_dict())


def _optimizer(parameters, learning_rate: float, steps: int):
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-2)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def _step(loss, optimizer, schedule, parameters) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def _draw(images: torch.Tensor, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(len(images), (batch_size,), generator=generator)


def _to_model_range(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1  # uint8 [0, 255] -> float32 [-1, 1]
