"""Training of a text-to-image latent diffusion model, in two phases (Rombach et al., CVPR 2022).

First the autoencoder learns to reconstruct images: mean squared error per pixel, and a little of the posterior's KL
divergence. Its latents are then standardised per channel, by scaling its 1x1 convolutions, and computed once. Then the
denoiser and the text encoder learn together to predict the noise (Ho et al., NeurIPS 2020, eq. 14). Some captions are
empty, so that the unconditional prompt "" has a meaning.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Generator, Tensor, nn
from torch.nn import functional

from pipeline import devices, seeding
from pipeline.io.resumable import ResumableStore
from pipeline.progress import progress_bar
from pipeline.settings.params import GuideTraining
from stages.prepare_backbone.training import learner as steps
from stages.prepare_backbone.training.architecture import SIZES, TEXT_LENGTH, build
from stages.prepare_backbone.training.corpus import Corpus
from stages.prepare_backbone.training.learner import Learner

log = logging.getLogger(__name__)

_KL_WEIGHT = 1e-5  # of an image's KL divergence, next to the mean squared error per pixel in [-1, 1]
_ENCODE_BATCH = 250
_PICTURES = 10  # of samples, over the denoiser's training
_SHARE_OF_MEMORY = 0.5  # of a GPU's free memory, which images or latents may fill


@dataclass(frozen=True)
class Machine:
    """Where and how to compute.

    Attributes:
        device: A torch device.
        compile: Compile the denoiser (torch.compile): minutes once.
        graph: Record a step as a CUDA graph, on a GPU.
    """

    device: str
    compile: bool = False
    graph: bool = True

    def holds(self, num_bytes: int) -> bool:
        """Return whether the device should hold data of this size all the time."""
        return not self.device.startswith("cuda") or (
            num_bytes < _SHARE_OF_MEMORY * torch.cuda.mem_get_info(self.device)[0]
        )


class Trainer:
    """A model in training.

    Attributes:
        settings: May be replaced between the phases.
        pipe: The model, float32 on the device.
        captions: The caption of each class, by label.
        losses: The loss of each finished phase, the mean over its last `READ_EVERY` steps.
    """

    def __init__(
        self,
        corpus: Corpus,
        settings: GuideTraining,
        machine: Machine,
        store: ResumableStore | None = None,
        checkpoint_seconds: float = 0.0,
    ) -> None:
        """Draw the first weights.

        Checkpoints are kept in `store`, at least `checkpoint_seconds` apart; its folder is keyed by everything that
        determines them. Without a store, there are none. Raise ConfigError if a caption is too long.
        """
        self.captions = [settings.caption.replace("{class_name}", name) for name in corpus.class_names]
        with seeding.scoped_global_torch_seed(settings.seed, "guide", "weights"):
            self.pipe = build(SIZES[settings.size], settings.image_size, self.captions)
        self.pipe.to(machine.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.losses: dict[str, float] = {}
        self.settings, self._corpus, self._machine = settings, corpus, machine
        self._images_are_resident = machine.holds(corpus.images.nbytes)
        self._store, self._checkpoint_seconds = store, checkpoint_seconds

    def train(self, draw: Callable[[StableDiffusionPipeline, list[str]], None] = lambda pipe, captions: None) -> None:
        """Train both phases, or what a checkpoint has left of them.

        `draw` is called every so often, with the model as it would be if training ended, and its captions.
        """
        self.train_autoencoder()
        self.train_denoiser(self.encode(), draw)

    def train_autoencoder(self) -> None:
        """Train the autoencoder, then standardise its latents."""
        settings, vae = self.settings, self.pipe.vae
        rate = settings.autoencoder_learning_rate or SIZES[settings.size].autoencoder_learning_rate
        vae.train()
        images, batch, resident = self._images(), settings.batch_size, self._images_are_resident
        side, channels = vae.config.sample_size // 4, vae.config.latent_channels

        def loss(generator: Generator) -> Tensor:
            pixels = _to_model_range(_take(images, _draw(len(images), batch, generator), generator.device))
            if settings.flips:
                mirrored = torch.rand(batch, 1, 1, 1, generator=generator, device=generator.device) < 0.5
                pixels = torch.where(mirrored, pixels.flip(3), pixels)
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(batch, channels, side, side, generator=generator, device=generator.device)
            reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
            return functional.mse_loss(reconstruction.float(), pixels) + _KL_WEIGHT * posterior.kl().mean()

        learner = self._learner("autoencoder", [vae], loss, settings.autoencoder_steps, rate, resident)
        self._run(learner, lambda: None)
        self._standardise(images)

    def encode(self) -> Tensor:
        """Return the latents of all images, float32 (V, N, 4, h, w), on the device if it holds them.

        V is 2, the images and their mirror images, if the settings ask for flips, and else 1.
        """
        images = self._images()
        views = [False, True] if self.settings.flips else [False]
        latents = torch.stack([self._means(images, mirrored) for mirrored in views])
        fits = self._machine.holds(latents.nbytes)
        return latents.to(self._machine.device) if fits else latents

    def train_denoiser(
        self,
        latents: Tensor,
        draw: Callable[[StableDiffusionPipeline, list[str]], None] = lambda pipe, captions: None,
    ) -> None:
        """Train the denoiser and the text encoder on latents as `encode` returns them; see `train`."""
        settings, pipe, device = self.settings, self.pipe, torch.device(self._machine.device)
        rate = settings.denoiser_learning_rate or SIZES[settings.size].denoiser_learning_rate
        batch, (views, rows) = settings.batch_size, latents.shape[:2]
        latents = latents.flatten(0, 1)  # (V * N, 4, h, w)
        labels = torch.from_numpy(self._corpus.labels).repeat(views).to(latents.device)
        empty = len(self.captions)
        texts = [*self.captions, ""]
        tokens = pipe.tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
        tokens = tokens.to(device)
        alphas = pipe.scheduler.alphas_cumprod.to(device)
        num_timesteps, shape = len(alphas), latents.shape[1:]
        each_once = len(texts) <= batch
        # Not compiled in place: pictures are drawn in batches of another size.
        denoise = torch.compile(pipe.unet) if self._machine.compile else pipe.unet

        def loss(generator: Generator) -> Tensor:
            index = _draw(views * rows, batch, generator)
            clean, caption = _take(latents, index, device), _take(labels, index, device)
            unconditional = torch.rand(batch, generator=generator, device=device) < settings.empty_caption_rate
            caption = torch.where(unconditional, empty, caption)
            if each_once:  # fewer texts than images: encode each text once
                prompt_embeds = pipe.text_encoder(tokens)[0].index_select(0, caption)
            else:
                prompt_embeds = pipe.text_encoder(tokens[caption])[0]
            # One timestep from each of B equal parts of the schedule: the loss varies less between batches.
            part = torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)
            timesteps = (part * (num_timesteps / batch)).long().clamp(max=num_timesteps - 1)
            noise = torch.randn(batch, *shape, generator=generator, device=device)
            alpha = alphas[timesteps].view(-1, 1, 1, 1)
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            predicted = denoise(noisy, timesteps, prompt_embeds, return_dict=False)[0]
            return functional.mse_loss(predicted.float(), noise)

        resident = latents.device.type == device.type
        pipe.unet.train()
        pipe.text_encoder.train()
        parts = [pipe.unet, pipe.text_encoder]
        learner = self._learner("denoiser", parts, loss, settings.denoiser_steps, rate, resident)

        def picture() -> None:
            with learner.averaged():
                draw(pipe, self.captions)

        self._run(learner, picture)
        draw(pipe, self.captions)

    def save(self, folder: Path) -> None:
        """Write the model as a diffusers pipeline directory, float16 safetensors; it then stays in float16."""
        self.pipe.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)

    def _learner(
        self,
        name: str,
        parts: list[nn.Module],
        loss: Callable[[Generator], Tensor],
        num_steps: int,
        rate: float,
        resident: bool,
    ) -> Learner:
        if self._machine.device.startswith("cuda"):
            for part in parts:
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # of tensor cores
        settings = self.settings
        modules = nn.ModuleList(parts)
        return Learner(
            name, modules, loss, num_steps, rate, settings.ema_decay, settings.seed, resident and self._machine.graph
        )

    def _run(self, learner: Learner, picture: Callable[[], None]) -> None:
        """Do all steps after the checkpoint, if there is one, and leave the averaged weights in the modules."""
        kept = self._store.load(learner.name, self._machine.device) if self._store else None
        losses: dict[str, float] = {}
        if kept:
            learner.restore(*kept)
            losses = {key: kept[1][key] for key in ("loss",) if key in kept[1]}
            log.info("%s: resuming after step %d of %d", learner.name, learner.step, learner.steps)
        saved = time.monotonic()
        every_tenth = max(1, learner.steps // _PICTURES)
        # On a GPU, the fastest convolutions are found by trying; shapes never change.
        fast = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True)
        with fast, progress_bar(learner.steps, f"train {learner.name}", "step") as bar:
            bar.update(learner.step)
            while learner.step < learner.steps:
                try:
                    learner.advance()
                except RuntimeError as error:
                    raise steps.out_of_memory(error, self.settings.batch_size) or error from None
                at_end = learner.step == learner.steps
                at_tenth = learner.step % every_tenth == 0
                if at_end or learner.step % steps.READ_EVERY == 0:
                    losses["loss"] = learner.mean_loss()
                    bar.set_postfix_str(f"loss {losses['loss']:.4f}", refresh=False)
                if at_tenth and not at_end and losses:
                    log.info("%s: step %d of %d, loss %.4f", learner.name, learner.step, learner.steps, losses["loss"])
                    picture()
                if self._store and (at_end or self._is_due(learner, saved)):
                    tensors, meta = learner.state()
                    self._store.save(learner.name, tensors, meta | losses)
                    saved = time.monotonic()
                bar.update()
        self.losses[learner.name] = losses["loss"]
        log.info("%s: loss %.4f after %d steps", learner.name, losses["loss"], learner.steps)
        learner.finish()

    def _is_due(self, learner: Learner, saved: float) -> bool:
        """Return whether a checkpoint should be written now: as a rule, after a look at the loss, which waits."""
        looked = learner.step % steps.READ_EVERY == 0 or not self._machine.device.startswith("cuda")
        return looked and time.monotonic() - saved >= self._checkpoint_seconds

    def _images(self) -> Tensor:
        """Return the images, uint8 (N, 3, S, S), on the device if it holds them."""
        images = torch.from_numpy(self._corpus.images).permute(0, 3, 1, 2)
        return images.to(self._machine.device) if self._images_are_resident else images

    @torch.no_grad()
    def _means(self, images: Tensor, mirrored: bool = False) -> Tensor:
        """Return the means of the images' posteriors, float32 (N, 4, h, w) on the host."""
        vae = self.pipe.vae
        found = []
        for chunk in images.split(_ENCODE_BATCH):
            pixels = _to_model_range(chunk.to(self._machine.device))
            found.append(vae.encode(pixels.flip(3) if mirrored else pixels).latent_dist.mean.float().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def _standardise(self, images: Tensor) -> None:
        """Scale and shift the latents to mean 0 and variance 1 per channel, and undo it before the decoder.

        The model's scaling_factor is then 1. Both 1x1 convolutions around the latents absorb it exactly:
        (W x + b - m) / s in the encoder's, and W (s z + m) + b in the decoder's.
        """
        vae: AutoencoderKL = self.pipe.vae
        chosen = seeding.numpy_generator(self.settings.seed, "guide", "standardise").permutation(len(images))[:4000]
        latents = self._means(images[torch.from_numpy(np.sort(chosen)).to(images.device)])
        std, mean = torch.std_mean(latents, dim=(0, 2, 3))  # (4,)
        std, mean = std.clamp(min=1e-4).to(self._machine.device), mean.to(self._machine.device)
        channels = len(std)
        into, out_of = vae.quant_conv, vae.post_quant_conv
        into.weight[:channels] /= std[:, None, None, None]
        into.bias[:channels] = (into.bias[:channels] - mean) / std
        into.bias[channels:] -= 2 * std.log()  # the logarithm of the posterior's variance
        out_of.bias += (out_of.weight[:, :, 0, 0] * mean).sum(1)
        out_of.weight *= std[None, :, None, None]
        vae.register_to_config(scaling_factor=1.0)


def _draw(count: int, batch_size: int, generator: Generator) -> Tensor:
    return torch.randint(count, (batch_size,), generator=generator, device=generator.device)


def _take(values: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """Return rows of a tensor on the device, wherever the tensor is."""
    return devices.send(values[index.to(values.device)], torch.device(device))


def _to_model_range(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1  # uint8 [0, 255] -> float32 [-1, 1]
