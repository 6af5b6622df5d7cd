"""Check both stages on this machine's GPU, and measure them: the first thing to run on a new kind of GPU.

From the least to the most demanding; the table and its JSON are written again after every check, so that a run that is
cut short keeps what it has. Needs no network, no DVC and no Flower.

device      what the GPU is, and its speed in large products of random matrices
families    features of tiny-sd and of tiny models of every family: GPU against CPU, in three dtypes
batches     the same features with two batch sizes
resume      an extraction that is killed and resumed against one that is not, byte by byte
methods     two rounds of every method: GPU against CPU, and steps replayed as CUDA graphs against eager ones
syncs       how often a training step waits for the device, by method
extraction  stage 1 with Stable Diffusion 2.1 at full size, random weights, eager and compiled, against plain diffusers
training    stage 2: ResNet-10, a step eager and as a graph against a bare loop, and the paper's CIFAR-10 protocol

    make gpu-check
    PYTHONPATH=. python3 benchmarks/gpu_check.py --only methods --only syncs
    PYTHONPATH=. python3 benchmarks/gpu_check.py --device cpu   # tests the checks themselves, at small sizes
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import extract
import numpy as np
import stable_diffusion
import torch
from ruamel.yaml import YAML
from torch import Tensor
from torch.nn import functional

from pipeline import provenance, seeding
from pipeline.data.datasets import Images
from pipeline.diffusion import batching
from pipeline.diffusion.prompts import PromptSet
from pipeline.diffusion.representation import Projector
from pipeline.diffusion.session import FrozenSession
from pipeline.settings import params
from pipeline.settings.params import ExtractFeatures, Runtime, TrainFL
from stages.extract_features.extraction import Extraction
from stages.train_fl import methods, rounds, session
from stages.train_fl.augmentation import augment, draw
from stages.train_fl.client_data import Batches, ClientData
from stages.train_fl.data import HeldOut
from stages.train_fl.engines import local
from stages.train_fl.guidance import GuidanceTargets
from stages.train_fl.methods import Method
from stages.train_fl.models import FLModel

ROOT = Path(__file__).parents[1]
PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass
class Check:
    """The machine, the sizes, and what a check found: lines of text and numbers."""

    device: str
    small: bool  # for a CPU
    lines: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """Add a line of the table."""
        self.lines.append(line)
        click.echo(line)

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    def wait(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, action: Callable[[], Any]) -> float:
        """Return the seconds of a call."""
        self.wait()
        started = time.perf_counter()
        action()
        self.wait()
        return time.perf_counter() - started

    @contextlib.contextmanager
    def peak(self, name: str) -> Iterator[None]:
        """Record the peak of the GPU's memory during the block, in bytes, as a number."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if self.is_cuda:
            self.numbers[name] = torch.cuda.max_memory_allocated(self.device)


# ------------------------------------------------------------------------------------------------------------- device


def check_device(check: Check) -> None:
    """Name the GPU and measure products of random matrices and a copy within its memory."""
    check.numbers |= provenance.describe(check.device)
    name = provenance.processor(check.device)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    check.say(f"{name}, {versions}")
    if check.is_cuda:
        free, total = torch.cuda.mem_get_info(check.device)
        check.say(f"memory: {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    for precision in PRECISIONS:
        with _tf32(precision == "tf32"):
            peak = extract.matrix_peak(check.device, precision.replace("tf32", "float32"))
        check.numbers[f"{precision}_tflops"] = peak / 1e12
        check.say(f"matrix product {precision:9} {peak / 1e12:7.1f} TFLOP/s")
    values = torch.randn(2**20 if check.small else 2**29, device=check.device)
    seconds = statistics.median(check.seconds(values.clone) for _ in range(5))
    check.numbers["copy_bytes_per_second"] = 2 * values.nbytes / seconds
    check.say(f"copy in memory           {2e-12 * values.nbytes / seconds:7.2f} TB/s, read and written")


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


# ----------------------------------------------------------------------------------------------------------- families

_LARGEST_ERROR = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}


def check_families(check: Check) -> None:
    """Compare the features of tiny models with the CPU's in float32."""
    check.say(f"{'relative error':15}{'float32':>10}{'bfloat16':>10}{'float16':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in _tiny_models(Path(folder), check.small).items():
            reference, basis = _features(name, path, "cpu", "float32", None)
            errors = {}
            for dtype in _LARGEST_ERROR:
                found, _ = _features(name, path, check.device, dtype, basis)
                errors[dtype] = float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
            check.numbers[name] = errors
            wrong = [dtype for dtype, error in errors.items() if not error <= _LARGEST_ERROR[dtype]]
            verdict = f"   WRONG: {', '.join(wrong)}" if wrong else ""
            check.say(f"{name:15}" + "".join(f"{error:>10.1e}" for error in errors.values()) + verdict)


def _tiny_models(folder: Path, small: bool) -> dict[str, Path]:
    from tests.extract_features import tiny_models

    if small:
        return {"tiny-sd": extract.TINY_SD, "dit": tiny_models.dit(folder / "dit")}
    return {"tiny-sd": extract.TINY_SD} | {name: make(folder / name) for name, make in tiny_models.FAMILIES.items()}


def _features(name: str, path: Path, device: str, dtype: str, basis: Any) -> tuple[np.ndarray, Any]:
    """Return features, float (images, 1 + prompts, D), and their basis: the given one, or one fitted here."""
    count = 24
    side = 32 if name == "tiny-sd" else 64
    texts = ["goldfish", "tench"] if name == "dit" else ["a photo of a cat", "a photo of a dog"]
    generic = {"denoise_prompt": "cock"} if name == "dit" else {}
    settings = _settings(image_size=side, dtype=dtype, dims=[16, 16, 16], **generic)
    data = _random_images(count, side)
    with batching.reproducible(device, getattr(torch, dtype)):
        prompts = PromptSet([[text] for text in texts], "label")
        made = FrozenSession(path, settings.layers, prompts, settings, _runtime(device, unet_batch_size=16), device)
        extraction = Extraction(made, data, settings)
        basis = basis or extraction.fit_basis(np.arange(count))
        return extract.ours(extraction, Projector(basis.layers, device), count), basis


@functools.cache
def _section(name: str) -> dict[str, Any]:
    """Return a section of the repository's params.yaml."""
    return YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))[name]


def _settings(**changes: Any) -> ExtractFeatures:
    return ExtractFeatures(**_section("extract_features") | changes)


def _runtime(device: str, **changes: Any) -> Runtime:
    return Runtime(**_section("runtime") | {"device": device} | changes)


def _random_images(count: int, side: int) -> Images:
    generator = seeding.numpy_generator(0, "gpu-check")
    pixels = generator.integers(0, 256, (count, side, side, 3), np.uint8)
    return Images.of_one_domain(pixels, generator.integers(0, 2, count))


# ------------------------------------------------------------------------------------------------------------ batches


def check_batches(check: Check) -> None:
    """Compare tiny-sd's features between batches of 64 and of 256 pairs."""
    data, texts = _random_images(20 if check.small else 256, 32), ["a photo of a cat", "a photo of a dog"]
    for dtype in ("float32",) if check.small else ("float32", "bfloat16"):
        settings = _settings(dtype=dtype, dims=[16, 16, 16])
        found, basis = [], None
        with batching.reproducible(check.device, getattr(torch, dtype)):
            for size in (4, 4, 16) if check.small else (64, 64, 256):
                prompts = PromptSet([[text] for text in texts], "label")
                runtime = _runtime(check.device, unet_batch_size=size)
                made = FrozenSession(extract.TINY_SD, "auto", prompts, settings, runtime, check.device)
                extraction = Extraction(made, data, settings)
                basis = basis or extraction.fit_basis(np.arange(min(40, len(data))))
                found.append(extract.ours(extraction, Projector(basis.layers, check.device), len(data)))
        again, other = (float((one == found[0]).mean()) for one in found[1:])
        error = float(np.linalg.norm(found[2] - found[0]) / np.linalg.norm(found[0]))
        check.numbers[dtype] = {"same_batch_equal": again, "other_batch_equal": other, "other_batch_error": error}
        check.say(
            f"{dtype:9} equal values: {again:.2%} with the same batch, {other:.2%} with another (relative error "
            f"{error:.1e})"
        )


# ------------------------------------------------------------------------------------------------------------- resume


def check_resume(check: Check) -> None:
    """Kill an extraction by the command line after its first shards, resume it, and compare every file."""
    with tempfile.TemporaryDirectory() as folder:
        sets = {}
        _prepare_project(Path(folder) / "prepared", check)
        for name in ("undisturbed", "killed"):
            root = shutil.copytree(Path(folder) / "prepared", Path(folder) / name)
            if name == "killed":
                done = _killed_after_shards(root, 2)
                check.numbers["killed_after_shards"] = done
            _pipeline(root, "extract-features")
            sets[name] = next((root / "data" / "features").iterdir())
        names = sorted(file.name for file in sets["undisturbed"].glob("*.h5"))
        different = [
            name for name in names if (sets["killed"] / name).read_bytes() != (sets["undisturbed"] / name).read_bytes()
        ]
    check.numbers |= {"files": len(names), "different": different}
    verdict = f"DIFFERENT: {', '.join(different)}" if different else "all equal"
    check.say(f"killed after {done} of {len(names) - 1} shards and resumed: {len(names)} files, {verdict}")


def _prepare_project(root: Path, check: Check) -> None:
    yaml = YAML()
    settings = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    settings["prepare_data"]["train_subset"] = 200 if check.small else None
    settings["extract_features"].update({"rows_per_shard": 32, "basis_images": 100})
    settings["runtime"]["device"] = check.device
    root.mkdir()
    with (root / "params.yaml").open("w", encoding="utf-8") as stream:
        yaml.dump(settings, stream)
    for command in ("prepare-data", "prepare-backbone"):
        _pipeline(root, command)


def _start(root: Path, command: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    arguments = [sys.executable, "-m", "pipeline", command]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, cwd=root, env=environment, **pipes)  # type: ignore[call-overload]


def _pipeline(root: Path, command: str) -> None:
    process = _start(root, command)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"pipeline {command} failed: {errors.strip()[-2000:]}")


def _killed_after_shards(root: Path, count: int) -> int:
    process = _start(root, "extract-features")
    while process.poll() is None and len(list(root.glob(".pipeline/staging/*/shard-*.json"))) < count:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return len(list(root.glob(".pipeline/staging/*/shard-*.json")))


# ------------------------------------------------------------------------------------------------- methods and syncs

_PROMPTS, _CLASSES = 10, 10


def check_methods(check: Check) -> None:
    """Run two rounds of every method on the CPU and on the GPU, there eagerly and with graphs in four streams."""
    check.say(f"{'relative change of weights':28}{'GPU - CPU':>10}{'graphs - eager':>16}")
    for name, augmentation in [*dict.fromkeys(params.METHODS, "crop-flip").items(), ("fedavg", "none")]:
        reference = _two_rounds(name, augmentation, "cpu", False, check.small)
        eager = _two_rounds(name, augmentation, check.device, False, check.small)
        graphs = _two_rounds(name, augmentation, check.device, True, check.small)
        errors = _distance(eager, reference), _distance(graphs, eager)
        title = name if augmentation != "none" else f"{name}, not augmented"
        check.numbers[title] = {"cpu": errors[0], "graphs": errors[1]}
        # SimSiam's BatchNorm over a small batch amplifies rounding.
        wrong = "   WRONG" if not errors[0] <= (0.1 if name == "simsiam" else 1e-2) or errors[1] else ""
        exact = "same bytes" if errors[1] == 0 else f"{errors[1]:.1e}"
        check.say(f"{title:28}{errors[0]:>10.1e}{exact:>16}{wrong}")


def _two_rounds(algorithm: str, augmentation: str, device: str, with_graphs: bool, small: bool) -> dict[str, Tensor]:
    """Return the change of the global weights in two rounds of four clients, on the CPU."""
    method, _ = _method(algorithm, "small_cnn", "float32", device, with_graphs)
    augmentation = "views" if method.needs_augmentation else augmentation
    guided = method.local_sgd.guidance is not None
    clients = [_random_client(size, guided, 144).to(device) for size in ((8, 20) if small else (70, 128, 100, 256))]
    schedule = rounds.Schedule(2, len(clients), 1 if small else 3, 16, 0.001, 1.0, augmentation, 0)
    start = rounds.begin(method, session.weights_of(method.local_sgd.model))
    before = {key: value.cpu() for key, value in start.server.weights.items()}
    done = list(local.run(method, start, clients, schedule, device, 4 if with_graphs else 1))[-1]
    after = {key: value.cpu() for key, value in done.progress.server.weights.items()}
    return {key: after[key] - before[key] for key in after if after[key].is_floating_point()}


def _distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    difference = sum((first[key] - second[key]).square().sum().item() for key in second)
    return (difference / sum(value.square().sum().item() for value in second.values())) ** 0.5


def _method(algorithm: str, encoder: str, precision: str, device: str, with_graphs: bool) -> tuple[Method, TrainFL]:
    settings = params.METHODS[algorithm]()
    train = TrainFL(**_section("train_fl") | {"model": encoder, "precision": precision})
    guidance_dim = (144 if encoder == "small_cnn" else 512) if methods.guidance_of(settings) else None
    kind = methods.method_class(settings)
    _, made = session.build(train, settings, kind, _CLASSES, guidance_dim, 10, 0, device, cuda_graphs=with_graphs)
    return made, train


def _random_client(count: int, guided: bool, dims: int, seed: int = 0) -> ClientData:
    generator = torch.Generator().manual_seed(seed + count)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(_CLASSES, (count,), generator=generator)
    if not guided:
        return ClientData(images, labels)
    targets = [torch.randn(count, *shape, dims, generator=generator) for shape in ((), (_PROMPTS,))]
    return ClientData(images, labels, GuidanceTargets(*map(_unit, targets), labels))


def _unit(values: Tensor) -> Tensor:
    return functional.normalize(values, dim=-1)


def check_syncs(check: Check) -> None:
    """Count the waits of a client's update for the device: those of each step, and those of the whole update."""
    if not check.is_cuda:
        check.say("skipped: only a GPU has waits to count")
        return
    for name in params.METHODS:
        found = {epochs: _syncs(name, check.device, epochs) for epochs in (1, 3)}
        steps = 2 * 8  # that three epochs have more than one
        each = (found[3] - found[1]) / steps
        check.numbers[name] = {"per_step": each, "per_update": found[1] - each * 8}
        check.say(f"{name:28}{each:>8.2f} a step{found[1] - each * 8:>8.1f} an update")


def _syncs(algorithm: str, device: str, epochs: int) -> int:
    method, _ = _method(algorithm, "small_cnn", "float32", device, False)
    data = _random_client(64, method.local_sgd.guidance is not None, 144).to(device)
    batches = Batches(data, epochs, 8, "views" if method.needs_augmentation else "crop-flip", torch.Generator(), device)
    weights = session.weights_of(method.local_sgd.model)
    server = method.init_server(weights)
    method.client_update(weights, server.broadcast, method.init_client(weights), batches, 0.01)  # warms up
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            method.client_update(weights, server.broadcast, method.init_client(weights), batches, 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


# --------------------------------------------------------------------------------------------------------- extraction


def check_extraction(check: Check) -> None:
    """Measure stage 1: Stable Diffusion 2.1 at 224 pixels in bfloat16, 1 + 10 passes per image, 512 images."""
    count, baseline, side = (32, 2, 32) if check.small else (512, 3, 224)
    dtype = "float32" if check.small else "bfloat16"
    settings = _settings(image_size=side, dtype=dtype)
    data = _random_images(count, side)
    names = [f"a photo of a {number}" for number in range(2 if check.small else 10)]
    peak = extract.matrix_peak(check.device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        path = extract.TINY_SD if check.small else stable_diffusion.save("sd21", Path(folder) / "sd21")
        check.say(f"weights written in {time.perf_counter() - started:.0f} s")
        rows = {}
        for name in ("eager",) if check.small else ("eager", "compiled"):
            runtime = _runtime(check.device, compile=name == "compiled")
            rows[name] = extract.measure(extract.Job(path, settings, runtime, data, names, check.device), baseline)
            _say_extraction(check, name, rows[name], peak)
            if check.is_cuda:
                torch.cuda.empty_cache()
    check.numbers |= rows | {"matrix_peak": peak, "model": path.name}


def _say_extraction(check: Check, name: str, row: dict[str, Any], peak: float) -> None:
    row["peak_share"] = row["flops_per_second"] / peak
    check.say(f"{name}: ready after {row['seconds_until_ready']:.1f} s, batches of {row['batch']}")
    check.say(f"  {row['images_per_second']:.1f} images/s, {row['passes']} passes each")
    check.say(f"  {row['flops_per_second'] / 1e12:.0f} TFLOP/s, {row['peak_share']:.0%} of the matrix peak")
    check.say(f"  peak memory {row['peak_memory_bytes'] / 1e9:.1f} GB")
    check.say(
        f"  diffusers, one image and prompt at a time in float32: {row['baseline_images_per_second']:.2f} images/s; "
        f"ours is {row['ratio']:.0f} times as fast (relative difference {row['relative_difference']:.1e})"
    )


# ----------------------------------------------------------------------------------------------------------- training


def check_training(check: Check) -> None:
    """Measure stage 2: a step of ResNet-10 with batches of 64, and rounds of the paper's protocol on random images."""
    steps = 1 if check.small else 150
    check.say(f"{'ms per step':20}{'bare':>8}{'eager':>8}{'graph':>8}")
    for precision in PRECISIONS[:1] if check.small else PRECISIONS:
        for algorithm in ("fedavg", "feddifrc"):
            times = _steps(check, algorithm, precision, steps)
            check.numbers[f"{algorithm} {precision}"] = times
            check.say(f"{algorithm + ' ' + precision:20}" + "".join(f"{1e3 * value:>8.2f}" for value in times.values()))
    found = check.numbers["rounds"] = {}
    check.say("rounds of the small CNN: 10 clients of 500 images, all in a round, 5 local epochs")
    for streams in (1,) if check.small else (1, 2, 4, 8):
        sizes = (32, 1, 2) if check.small else (500, 5, 6)
        seconds = _seconds_per_round(check, "fedavg", "small_cnn", "tf32", streams, 10, *sizes)
        found[f"small_cnn {streams}"] = seconds
        check.say(f"{streams} stream(s): {seconds:.3f} s a round")
    check.say("the paper's CIFAR-10 protocol, ResNet-10: 10 clients of 5,000 images, 5 in a round, 10 local epochs")
    kinds = [("fedavg", "tf32", 1), ("fedavg", "tf32", 4), ("feddifrc", "tf32", 4), ("feddifrc", "bfloat16", 4)]
    for algorithm, precision, streams in kinds[:1] if check.small else kinds:
        sizes = (64, 1, 2) if check.small else (5000, 10, 3)
        name = f"{algorithm} {precision} {streams}"
        with check.peak(f"{name} bytes"):
            seconds = found[name] = _seconds_per_round(check, algorithm, _encoder(check), precision, streams, 5, *sizes)
        memory = check.numbers.get(f"{name} bytes", 0) / 1e9
        check.say(
            f"{algorithm:9} {precision:9} {streams} stream(s): {seconds:.2f} s a round, 50 rounds in "
            f"{50 * seconds / 60:.1f} min, {memory:.1f} GB"
        )


def _steps(check: Check, algorithm: str, precision: str, steps: int) -> dict[str, float]:
    """Return the seconds per step of a bare PyTorch loop, and of local SGD without and with graphs."""
    kinds, encoder = {}, _encoder(check)
    for name, with_graphs in (("eager", False), ("graph", True)):
        method, _ = _method(algorithm, encoder, precision, check.device, with_graphs)
        data = _random_client(64 * steps, method.local_sgd.guidance is not None, method.local_sgd.model.embedding_dim)
        data = data.to(check.device)
        weights = session.weights_of(method.local_sgd.model)
        kinds[name] = lambda method=method, data=data, weights=weights: method.client_update(
            weights, {}, {}, Batches(data, 1, 64, "crop-flip", torch.Generator(), check.device), 0.01
        )
    bare_model = _method("fedavg", encoder, precision, check.device, False)[0].local_sgd.model
    bare_data = _random_client(64 * steps, False, 512).to(check.device)
    kinds = {"bare": lambda: _bare(bare_model, bare_data), **kinds}
    for run in kinds.values():
        run()
    return {
        name: statistics.median(check.seconds(run) for _ in range(1 if check.small else 3)) / steps
        for name, run in kinds.items()
    }


def _encoder(check: Check) -> str:
    return "small_cnn" if check.small else "resnet10"


def _bare(model: FLModel, data: ClientData) -> None:
    """Train one epoch by the usual PyTorch loop, with the same augmentation."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    for index in torch.randperm(len(data)).to(data.labels.device).split(64):
        numbers = draw(len(index), 32, "crop-flip", torch.default_generator).to(data.labels.device)
        loss = functional.cross_entropy(model(augment(data.images[index], "crop-flip", numbers))[1], data.labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def _seconds_per_round(
    check: Check, algorithm: str, encoder: str, precision: str, streams: int, participants: int, images: int,
    epochs: int, num_rounds: int,
) -> float:  # fmt: skip
    """Return the seconds per round of 10 clients, evaluation included, of the rounds after the first."""
    method, _ = _method(algorithm, encoder, precision, check.device, True)
    guided, dims = method.local_sgd.guidance is not None, method.local_sgd.model.embedding_dim
    clients = [_random_client(images, guided, dims, seed).to(check.device) for seed in range(10)]
    test = _random_client(128 if check.small else 10_000, False, dims).to(check.device)
    evaluator = session.evaluator_of(method, clients, HeldOut(test.images, test.labels, test.labels))
    schedule = rounds.Schedule(num_rounds, participants, epochs, 64, 0.01, 1.0, "crop-flip", 0)
    model, marks = method.local_sgd.model, []
    start = rounds.begin(method, session.weights_of(model))
    for done in local.run(method, start, clients, schedule, check.device, streams):
        session.score_round(done, model, evaluator)
        check.wait()
        marks.append(time.perf_counter())
    return (marks[-1] - marks[0]) / (num_rounds - 1)


CHECKS: dict[str, Callable[[Check], None]] = {
    "device": check_device,
    "families": check_families,
    "batches": check_batches,
    "resume": check_resume,
    "methods": check_methods,
    "syncs": check_syncs,
    "extraction": check_extraction,
    "training": check_training,
}


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:N, or cpu to test the checks.")
@click.option("--only", type=click.Choice(list(CHECKS)), multiple=True, help="Run only this check; repeatable.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Default: benchmarks/results/gpu-<name>.txt, if all checks run."
)
def main(device: str, only: tuple[str, ...], output: Path | None) -> None:
    """Run the checks and write the table."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise click.BadParameter(f"{device} is not a device. Use cuda, cuda:N or cpu.", param_hint="--device")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise click.ClickException(
            "This machine has no usable CUDA GPU. Use --device cpu to test the checks themselves."
        )
    session.prepare_torch(_runtime(device), 1 if device == "cpu" else os.cpu_count() or 1)
    name = re.sub(r"[^a-z0-9]+", "-", provenance.processor(device).lower()).strip("-")
    if not only and device != "cpu":
        output = output or ROOT / "benchmarks" / "results" / f"gpu-{name}.txt"
    text, numbers, failed = [], {}, []
    for title in only or CHECKS:
        click.echo(f"\n{title}")
        check, started = Check(device, device == "cpu"), time.perf_counter()
        try:
            CHECKS[title](check)
        except Exception as error:  # the next checks may still tell something
            traceback.print_exc()
            check.say(f"FAILED: {type(error).__name__}: {str(error).strip()[:500]}")
            failed.append(title)
        seconds = time.perf_counter() - started
        check.say(f"({seconds:.0f} s)")
        if any("WRONG" in line or "DIFFERENT" in line for line in check.lines):
            failed.append(title)
        text += ["", title, *check.lines]
        numbers[title] = check.numbers | {"seconds": seconds}
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text("\n".join([*text[1:], "", json.dumps(numbers), ""]), encoding="utf-8")
        if check.is_cuda:
            torch.cuda.empty_cache()
    click.echo(f"\nwritten to {output}" if output else "\nnot written to a file: see --output")
    if failed:
        raise click.ClickException(f"{', '.join(failed)} failed. The table says why.")


if __name__ == "__main__":
    main()
