"""Train a guide on half of CIFAR-10 within a given time, and measure it on the other half.

IMAGES holds train/<class>/*.jpg and test/<class>/*.jpg. OUTPUT gets two folders of links: public/, half of each class's
training images, and private/train and private/test, the other half and the test images. The guide is trained on public/
by the code of prepare-backbone. The numbers of steps follow from measured times of a step, so that all ends in time.

RESULTS gets, as they come: samples.png; weights.tar.00, ... (float16, parts of 15 MB: `cat weights.tar.* | tar x`); and
result.json, one line: steps and seconds, denoising loss and reconstruction error on images of both halves, and of
private images at several timesteps a linear probe and how often the matching prompt is the nearest.

    python benchmarks/cifar_guide.py ~/cifar10 /tmp/cifar-guide --size small --minutes 6
    python benchmarks/cifar_guide.py ~/cifar10 /tmp/cifar-guide --trained benchmarks/guides/cifar10-small
"""

import io
import json
import logging
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch.nn import functional

from pipeline import devices, provenance, seeding
from pipeline.data.datasets import Images, stratified_split
from pipeline.diffusion import batching, prompts
from pipeline.diffusion.representation import Projector
from pipeline.diffusion.session import FrozenSession
from pipeline.progress import progress_bar
from pipeline.settings import config
from pipeline.settings.params import ExtractFeatures, GuideTraining, Runtime
from stages.analyze_features import margins
from stages.analyze_features.probes import linear_probe, standard_error
from stages.extract_features.extraction import Extraction
from stages.prepare_backbone.training import corpus, samples
from stages.prepare_backbone.training.corpus import Corpus
from stages.prepare_backbone.training.trainer import Machine, Trainer

ROOT = Path(__file__).parents[1]
PART_BYTES = 15_000_000
HELD_OUT = 0.25  # of the images of a probe


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
@click.argument("images", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.option("--results", type=click.Path(path_type=Path, file_okay=False), help="Folder of results.  [OUTPUT]")
@click.option("--size", type=click.Choice(["nano", "small", "base"]), default="small", show_default=True)
@click.option("--minutes", default=6.0, show_default=True, help="Time for everything but imports.")
@click.option("--autoencoder-share", default=0.2, show_default=True, help="Share of the time for the autoencoder.")
@click.option("--reserve", default=60.0, show_default=True, help="Seconds kept for saving and measuring.")
@click.option("--batch-size", default=1024, show_default=True)
@click.option("--learning-rate", type=float, help="Of the denoiser.  [what suits the size]")
@click.option("--flips/--no-flips", default=True, show_default=True, help="Train on mirrored images, too.")
@click.option("--seed", default=0, show_default=True, help="Of the halves and of the training.")
@click.option("--device", default="auto", show_default=True)
@click.option("--compile/--no-compile", "compiled", default=False, show_default=True, help="Use torch.compile.")
@click.option("--graph/--no-graph", default=True, show_default=True, help="Record steps as CUDA graphs.")
@click.option("--probe-images", default=4000, show_default=True, help="Private training images for the probe.")
@click.option("--timesteps", default="100,200,300", show_default=True, help="Of the probe.")
@click.option("--negatives", type=int, help="Other prompts per image, at random.  [all]")
@click.option("--trained", type=click.Path(path_type=Path, exists=True), help="Measure this guide instead of training.")
@click.option("--limit", type=int, help="Use only this many images of each class: for a trial.")
def main(
    images: Path,
    output: Path,
    results: Path | None,
    size: str,
    minutes: float,
    autoencoder_share: float,
    reserve: float,
    batch_size: int,
    learning_rate: float | None,
    flips: bool,
    seed: int,
    device: str,
    compiled: bool,
    graph: bool,
    probe_images: int,
    timesteps: str,
    negatives: int | None,
    trained: Path | None,
    limit: int | None,
) -> None:
    """Run all steps."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.monotonic()

    def left() -> float:
        return 60 * minutes - reserve - (time.monotonic() - started)

    results = results or output
    results.mkdir(parents=True, exist_ok=True)
    machine = Machine(devices.resolve(device), compiled, graph)
    halves(images, output, seed, limit)
    broken = output / "broken-images.txt"
    private = corpus.read(output / "private", 32, broken)  # of its train/ only
    found: dict[str, Any] = {"seconds": {}, "private": {}}

    def report() -> None:
        found["seconds"]["all"] = round(time.monotonic() - started, 1)
        (results / "result.json").write_text(json.dumps(found) + "\n", encoding="utf-8")

    def measure(guide: Path) -> None:
        for timestep in timesteps.split(","):
            found["private"][timestep] = features(guide, private, int(timestep), probe_images, negatives, seed, machine)
            report()
            click.echo(f"t = {timestep}: {found['private'][timestep]}")
        click.echo(json.dumps(found))

    if trained:
        found |= {"guide": trained.name, "provenance": provenance.describe(machine.device)}
        measure(trained)
        return
    public = corpus.read(output / "public", 32, broken)
    found["seconds"]["read"] = round(time.monotonic() - started, 1)
    found |= {"images": {"public": len(public.images), "private": len(private.images)}}
    settings = GuideTraining.model_validate(
        {"size": size, "batch_size": batch_size, "denoiser_learning_rate": learning_rate, "flips": flips, "seed": seed}
    )
    # Enough steps for the libraries to settle, and few enough to lose little time.
    few, many = (20, 200) if machine.device.startswith("cuda") else (1, 3)

    def trial(steps: int) -> Trainer:
        changes = {"autoencoder_steps": steps, "denoiser_steps": steps}
        return Trainer(public, settings.model_copy(update=changes), machine)

    budget = autoencoder_share * 60 * minutes
    begun = time.monotonic()
    per_step = seconds_per_step(lambda steps: trial(steps).train_autoencoder(), machine, few, many)
    steps = max(1, int((budget - (time.monotonic() - begun)) / per_step))
    click.echo(f"autoencoder: {1000 * per_step:.1f} ms per step, {steps} steps")
    found |= {"autoencoder": {"steps": steps, "ms_per_step": round(1000 * per_step, 2)}}
    trainer = Trainer(public, settings.model_copy(update={"autoencoder_steps": steps}), machine)
    begun = time.monotonic()
    trainer.train_autoencoder()
    latents = trainer.encode()
    found["seconds"]["autoencoder"] = round(time.monotonic() - begun, 1)

    per_step = seconds_per_step(lambda steps: trial(steps).train_denoiser(latents), machine, few, many)
    steps = max(1, int(left() / per_step))
    click.echo(f"denoiser: {1000 * per_step:.1f} ms per step, {steps} steps in {left():.0f} s")
    found |= {"denoiser": {"steps": steps, "ms_per_step": round(1000 * per_step, 2)}}
    trainer.settings = trainer.settings.model_copy(update={"denoiser_steps": steps})
    begun = time.monotonic()

    def draw(pipe: Any, captions: list[str]) -> None:
        samples.write(results / "samples.png", samples.draw(pipe, captions, rows=4))

    trainer.train_denoiser(latents, draw)
    found["seconds"]["denoiser"] = round(time.monotonic() - begun, 1)
    found |= {"settings": trainer.settings.model_dump(), "losses": trainer.losses}
    parts = {name: getattr(trainer.pipe, name) for name in ("vae", "unet", "text_encoder")}
    found |= {"parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}}
    found |= {"provenance": provenance.describe(machine.device)}
    report()
    found |= {
        "loss_public": losses(trainer, public, machine, probe_images),
        "loss_private": losses(trainer, private, machine, probe_images),
    }
    save(trainer, output / "model", results)
    measure(output / "model")


def halves(images: Path, output: Path, seed: int, limit: int | None) -> None:
    """Make the two folders of links, unless they are there."""
    if (output / "private" / "test").is_dir():
        return
    for folder in sorted(path for path in (images / "train").iterdir() if path.is_dir()):
        files = sorted(folder.iterdir())
        order = seeding.numpy_generator(seed, "cifar guide", folder.name).permutation(len(files))[: limit and 2 * limit]
        for name, part in (("public", order[: len(order) // 2]), ("private/train", order[len(order) // 2 :])):
            link([files[position] for position in np.sort(part)], output / name / folder.name)
    for folder in sorted(path for path in (images / "test").iterdir() if path.is_dir()):
        link(sorted(folder.iterdir())[:limit], output / "private" / "test" / folder.name)


def link(files: list[Path], folder: Path) -> None:
    """Link files into a new folder."""
    folder.mkdir(parents=True)
    for file in files:
        try:
            os.link(file, folder / file.name)
        except OSError:  # another file system, or one without hard links
            (folder / file.name).symlink_to(file.resolve())


def seconds_per_step(train: Callable[[int], Any], machine: Machine, few: int, many: int) -> float:
    """Time a training of few and one of many steps, whose difference has none of their start, after one to warm up."""

    def timed(steps: int) -> float:
        begun = time.perf_counter()
        train(steps)
        if machine.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    timed(few)
    start, whole = timed(few), timed(many)
    return max((whole - start) / (many - few), 0.5 * whole / many)  # the difference of noisy times may be too small


@torch.no_grad()
def losses(trainer: Trainer, images: Corpus, machine: Machine, count: int) -> dict[str, float]:
    """Return the reconstruction's mean squared error, [-1, 1], and the denoising loss, of the first random images."""
    pipe, device = trainer.pipe, machine.device
    chosen = np.sort(np.random.default_rng(0).permutation(len(images.images))[:count])
    captions = pipe.tokenizer(trainer.captions, padding="max_length", return_tensors="pt").input_ids
    embeds = pipe.text_encoder(captions.to(device))[0]
    generator = torch.Generator().manual_seed(0)
    alphas = pipe.scheduler.alphas_cumprod.to(device)
    reconstruction, denoising = [], []
    for rows in np.array_split(chosen, max(1, len(chosen) // 500)):
        pixels = torch.from_numpy(images.images[rows]).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
        clean = pipe.vae.encode(pixels).latent_dist.mean
        reconstruction.append(functional.mse_loss(pipe.vae.decode(clean).sample, pixels).item())
        timesteps = torch.randint(len(alphas), (len(rows),), generator=generator).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        text = embeds[torch.from_numpy(images.labels[rows]).to(device)]
        predicted = pipe.unet(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timesteps, text).sample
        denoising.append(functional.mse_loss(predicted, noise).item())
    return {
        "reconstruction": round(float(np.mean(reconstruction)), 5),
        "denoising": round(float(np.mean(denoising)), 5),
    }


def save(trainer: Trainer, folder: Path, results: Path) -> None:
    """Write the float16 weights to a folder, and as parts of an archive."""
    trainer.save(folder)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(folder, folder.name)
    content = stream.getvalue()
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        (results / f"weights.tar.{number:02d}").write_bytes(content[start : start + PART_BYTES])


def features(
    folder: Path, images: Corpus, timestep: int, count: int, negatives: int | None, seed: int, machine: Machine
) -> dict[str, float]:
    """Extract features of private images as extract-features does, and measure them as analyze-features does."""
    begun = time.monotonic()
    values = config.read_yaml(ROOT / "params.yaml")
    settings = ExtractFeatures.model_validate(
        values["extract_features"] | {"timestep": timestep, "negatives": negatives or "all"}
    )
    runtime = Runtime.model_validate(values["runtime"])
    prompt_set = prompts.build(settings, images.class_names, Path)
    chosen, _ = stratified_split(images.labels, min(count, len(images.labels)), np.random.default_rng(seed))
    data = Images.of_one_domain(images.images[chosen], images.labels[chosen])
    with batching.reproducible(machine.device, torch.float32):
        session = FrozenSession(folder, "auto", prompt_set, settings, runtime, machine.device)
        extraction = Extraction(session, data, settings)
        basis = extraction.fit_basis(np.arange(0, len(data), max(1, len(data) // 1000)))
        projector = Projector(basis.layers, machine.device)
        index = np.arange(len(data))
        with progress_bar(len(data), f"features at {timestep}", "image") as bar:
            rows, _ = extraction.represent(index, extraction.clean_inputs(index), projector, bar)
    positive = (rows.prompt_class == rows.label[:, None]).argmax(1)
    similar = margins.similarities(rows.denoised, rows.prompted, positive).means(np.ones(len(rows), bool))
    held_out, fitted = stratified_split(rows.label, round(HELD_OUT * len(rows)), np.random.default_rng(seed))
    denoised = rows.denoised.astype(np.float64)
    accuracy = linear_probe().fit(denoised[fitted], rows.label[fitted]).score(denoised[held_out], rows.label[held_out])
    return {
        "probe": round(float(accuracy), 4),
        "probe_error": round(standard_error(float(accuracy), len(held_out)), 4),
        "matching_nearest": similar["matching_nearest"],
        "margin": similar["margin"],
        "dims": rows.denoised.shape[1],
        "seconds": round(time.monotonic() - begun, 1),
    }


if __name__ == "__main__":
    main()
