"""Compare extraction with a direct implementation in diffusers: same images, passes, model and basis, in one run.

(a) ours: the code of `pipeline extract-features`, without writing.
(b) diffusers: for every image and prompt, in sequence, encode the prompt, encode the image by the VAE, add noise, run
    the full UNet in float32 with hooks on the up blocks, apply PCA and pooling, as DIFT's published code and its
    successors do. Timed on fewer images, because it is slower.

The benchmark checks that both give the same features. FLOPs come from torch's counter; they are compared with the rate
of a large matrix product, measured here. Models are loaded, compiled and warmed up before the clock starts.

    python benchmarks/extract.py                                         # tiny-sd on the CPU
    python benchmarks/extract.py --real-size sd15 --images 1 --classes 1 --image-size 224
    python benchmarks/extract.py --real-size sd21 --image-size 224 --images 512 --device cuda --dtype bfloat16
"""

import functools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import stable_diffusion
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from ruamel.yaml import YAML
from transformers import CLIPTextModel, CLIPTokenizer

from pipeline import memory, provenance, seeding
from pipeline.data.datasets import Images
from pipeline.diffusion import batching
from pipeline.diffusion.prompts import PromptSet
from pipeline.diffusion.representation import Projector
from pipeline.diffusion.session import FrozenSession
from pipeline.settings.params import ExtractFeatures, Runtime
from stages.extract_features.cost import count_flops
from stages.extract_features.extraction import Extraction

ROOT = Path(__file__).parents[1]
TINY_SD = ROOT / "stages" / "prepare_backbone" / "tiny-sd"


@dataclass(frozen=True)
class Job:
    """Input of both implementations."""

    path: Path
    params: ExtractFeatures
    runtime: Runtime
    data: Images
    prompts: list[str]
    device: str


@click.command()
@click.option("--backbone", type=click.Path(path_type=Path), default=TINY_SD, help="A Stable Diffusion directory.")
@click.option("--real-size", type=click.Choice(list(stable_diffusion.SIZES)), help="Random weights of this size.")
@click.option("--images", default=256, help="Images for ours.")
@click.option("--baseline-images", default=8, help="Images for diffusers; 0 skips it.")
@click.option("--classes", multiple=True, type=int, default=[10], help='Prompts per image besides ""; repeatable.')
@click.option("--image-size", default=32, help="Pixels.")
@click.option("--device", default="cpu")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option("--batch", default="auto", help="Pairs per batch.")
@click.option("--compile", "compiled", is_flag=True)
def main(
    backbone: Path, real_size: str | None, images: int, baseline_images: int, classes: list[int], image_size: int,
    device: str, dtype: str, batch: str, compiled: bool,
) -> None:  # fmt: skip
    """Measure, print the table, then one JSON line."""
    sections = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params = ExtractFeatures(**sections["extract_features"] | {"image_size": image_size, "dtype": dtype})
    size = int(batch) if batch.isdigit() else batch
    runtime = Runtime(**sections["runtime"] | {"device": device, "unet_batch_size": size, "compile": compiled})
    pixels = seeding.numpy_generator(0, "benchmark").integers(0, 256, (images, image_size, image_size, 3), np.uint8)
    data = Images.of_one_domain(pixels, np.zeros(images, np.int64))
    with tempfile.TemporaryDirectory() as folder:
        path = stable_diffusion.save(real_size, Path(folder) / real_size) if real_size else backbone
        rows = []
        for count in classes:
            names = [f"a photo of a handwritten number {n}" for n in range(count)]
            rows.append(measure(Job(path, params, runtime, data, names, device), baseline_images))
        peak = matrix_peak(device, dtype)
    _print_table(rows, peak)
    setting = {"model": real_size or backbone.name, "image_size": image_size, "dtype": dtype, "compile": compiled}
    result = {"setting": setting, "rows": rows, "matrix_peak_tflops": peak / 1e12}
    click.echo(json.dumps(result | {"provenance": provenance.describe(device)}))


def measure(job: Job, baseline_images: int) -> dict:
    """Measure both implementations with this many prompts, and return a row of the table."""
    with batching.reproducible(job.device, getattr(torch, job.params.dtype)):
        row, projector, found = _measure_ours(job)
    if baseline_images:
        count = min(baseline_images, len(job.data))
        baseline = DiffusersAlone(job, projector)
        baseline.represent(0)
        seconds, theirs = _timed(job.device, lambda: np.stack([baseline.represent(n) for n in range(count)]))
        row["baseline_images_per_second"] = count / seconds
        row["ratio"] = row["images_per_second"] / row["baseline_images_per_second"]
        row["relative_difference"] = float(np.linalg.norm(found[:count] - theirs) / np.linalg.norm(theirs))
    return row


def _measure_ours(job: Job) -> tuple[dict, Projector, np.ndarray]:
    """Measure our implementation; return its part of the row, the basis, and the features."""
    started = time.perf_counter()
    prompt_set = PromptSet([[text] for text in job.prompts], "label")
    session = FrozenSession(job.path, job.params.layers, prompt_set, job.params, job.runtime, job.device)
    extraction = Extraction(session, job.data, job.params)
    projector = Projector(extraction.fit_basis(np.arange(min(len(job.data), 16))).layers, job.device)
    ours(extraction, projector, min(len(job.data), session.batcher.parallel_rows))
    _wait(job.device)
    ready = time.perf_counter() - started
    if job.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(job.device)
    seconds, found = _timed(job.device, lambda: ours(extraction, projector, len(job.data)))
    passes = 1 + len(job.prompts)
    vae, one_pass = count_flops(job.path, job.params.layers, job.params.image_size, session.model.conditioning)
    rate, flops = len(job.data) / seconds, vae + passes * one_pass
    row = {
        "passes": passes,
        "batch": session.batcher.batch_size,
        "seconds_until_ready": ready,
        "images_per_second": rate,
        "flops_per_image": flops,
        "flops_per_second": rate * flops,
        "peak_memory_bytes": _peak_memory(job.device),
    }
    return row, projector, found


def ours(extraction: Extraction, projector: Projector, count: int) -> np.ndarray:
    """Return float32 (count, 1 + prompts, D)."""
    index = np.arange(count)
    host = extraction.host_input(index)
    features, _ = extraction.represent(
        index, extraction.inputs(host, extraction.session.encode(host.images)), projector, _NoBar
    )
    return np.concatenate([features.denoised[:, None], features.prompted], axis=1).astype(np.float32)


class _NoBar:
    @staticmethod
    def update(count: float) -> None:
        pass


class DiffusersAlone:
    """One pass at a time that recomputes everything, written with diffusers' classes."""

    def __init__(self, job: Job, projector: Projector) -> None:
        """Load the models in float32 and register hooks on the UNet's up blocks."""
        self.job, self.projector = job, projector
        self.unet, self.vae, self.text = (
            kind.from_pretrained(job.path / name, use_safetensors=True).to(job.device, torch.float32).eval()
            for kind, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder"))
        )
        self.tokenizer = CLIPTokenizer.from_pretrained(job.path / "tokenizer")
        self.scheduler = DDIMScheduler.from_pretrained(job.path / "scheduler")
        self.maps: dict[str, torch.Tensor] = {}
        for block in (1, 2, 3):
            keep = functools.partial(self._keep, f"up_blocks.{block}")
            self.unet.up_blocks[block].register_forward_hook(keep)

    @torch.no_grad()
    def represent(self, image: int) -> np.ndarray:
        """Return float32 (1 + prompts, D)."""
        return np.concatenate([self._one_pass(image, prompt) for prompt in ["", *self.job.prompts]])

    def _one_pass(self, image: int, prompt: str) -> np.ndarray:
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        states = self.text(tokens.input_ids.to(self.job.device)).last_hidden_state
        pixels = torch.from_numpy(self.job.data.images[image]).to(self.job.device).float() / 127.5 - 1
        latents = self.vae.encode(pixels.permute(2, 0, 1)[None]).latent_dist.mean * self.vae.config.scaling_factor
        noise = torch.randn(latents.shape[1:], generator=seeding.torch_generator(0, "noise", image))[None]
        timestep = torch.tensor([self.job.params.timestep], device=self.job.device)
        noisy = self.scheduler.add_noise(latents, noise.to(self.job.device), timestep)
        self.unet(noisy, timestep, encoder_hidden_states=states)
        return self.projector(self.maps).cpu().numpy()

    def _keep(self, layer: str, module, inputs, output) -> None:
        self.maps[layer] = output


def matrix_peak(device: str, dtype: str) -> float:
    """Return the FLOP/s of a large matrix product in this type, the best of five or of those that start in a second."""
    side = 8192 if device.startswith("cuda") else 512
    # Random numbers: a GPU multiplies ones faster.
    left, right = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    left @ right
    seconds: list[float] = []
    while len(seconds) < 5 and sum(seconds) < 1:
        seconds.append(_timed(device, lambda: left @ right)[0])
    return 2 * side**3 / min(seconds)


def _timed(device: str, action) -> tuple[float, np.ndarray]:
    _wait(device)
    started = time.perf_counter()
    result = action()
    _wait(device)
    return time.perf_counter() - started, result


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _peak_memory(device: str) -> int:
    """Return the peak memory of the GPU, or on the CPU that of the process since it started."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return memory.peak()


def _print_table(rows: list[dict], peak: float) -> None:
    click.echo(f"matrix product: {peak / 1e12:.3g} TFLOP/s")
    click.echo("passes  batch  GFLOP/image  images/s  of peak  memory GB  diffusers images/s  ratio  difference")
    for row in rows:
        baseline = f"{row.get('baseline_images_per_second', 0):18.3g}  {row.get('ratio', 0):5.1f}"
        click.echo(
            f"{row['passes']:6}  {row['batch']:5}  {row['flops_per_image'] / 1e9:11.4g}  "
            f"{row['images_per_second']:8.3g}  {row['flops_per_second'] / peak:7.1%}  "
            f"{row['peak_memory_bytes'] / 1e9:9.2f}  {baseline}  {row.get('relative_difference', 0):10.1e}"
        )


if __name__ == "__main__":
    main()
