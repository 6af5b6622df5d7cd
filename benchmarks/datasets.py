"""Measure speed and memory of the prepared data set, and compare with simple alternatives.

Preparing: prepare-data reads, crops, resizes and writes a folder of synthetic photographs; the alternative is a loop
over torchvision's ImageFolder with the same resizing, whose results are only stacked. Reading: random batches through
the memory map that `load` returns, from an array in memory, and by h5py indexing, with a warm page cache; and the
memory needed to check and map a split. Prints a table, then one JSON line.

    python benchmarks/datasets.py --images 2000 --side 500 --image-size 224
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import h5py
import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

import stages.train_fl.methods  # noqa: F401  registers the settings of every method
from pipeline import provenance
from pipeline.data.datasets import PreparedDataset
from pipeline.settings import config
from stages import prepare_data

BATCH = 64
REPEATS = 20


@click.command()
@click.option("--images", default=500, help="Training images; the test split has a tenth as many.")
@click.option("--side", default=500, help="Height of a photograph in pixels; the width is 1.5 times the height.")
@click.option("--image-size", default=224, help="Size of the prepared images in pixels.")
def main(images: int, side: int, image_size: int) -> None:
    """Print images per second of preparing, and milliseconds per batch of reading."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write_photographs(root / "photographs", images, side)
        settings = _project(root, image_size)
        rates = {
            "prepare-data": _rate(lambda: prepare_data.run(settings), images + images // 10),
            "ImageFolder, loop": _rate(lambda: _loop(root / "photographs" / "train", image_size), images),
        }
        memory = _load_mebibytes(settings.dataset_dir)
        data = PreparedDataset(settings.dataset_dir).load("train")
        batches = _batches(settings.dataset_dir / "train.h5", data.images)
    for name, rate in rates.items():
        click.echo(f"{name:22} {rate:10.0f} images/s")
    for name, milliseconds in batches.items():
        click.echo(f"{name:22} {milliseconds:10.3f} ms for {BATCH} random rows")
    size = data.images.nbytes / 2**20
    click.echo(f"check and map          {memory:10.0f} MiB of additional peak memory, for {size:.0f} MiB of images")
    result = {
        "images_per_second": rates, "batch_milliseconds": batches, "load_mebibytes": memory, "set_mebibytes": size,
        "images": images, "side": side, "image_size": image_size, "hardware": provenance.describe("cpu"),
    }  # fmt: skip
    click.echo(json.dumps(result))


def _write_photographs(root: Path, images: int, side: int) -> None:
    """Write JPEG files with roughly the spectrum of photographs: noise, enlarged eight times."""
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("test", max(2, images // 10))):
        for number in range(count):
            path = root / split / f"class{number % 2}" / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(rng.integers(0, 256, (side // 8, side * 3 // 16, 3), np.uint8))
            noise.resize((side * 3 // 2, side), Image.Resampling.BICUBIC).save(path, quality=90)


def _project(root: Path, image_size: int) -> config.Config:
    shutil.copy("params.yaml", root)
    keys = {"name": "photographs", "source": "folder", "path": "photographs", "image_size": image_size}
    overrides = {f"prepare_data.{key}": value for key, value in (keys | {"train_subset": None}).items()}
    return config.load(root / "params.yaml", overrides)


def _loop(root: Path, image_size: int) -> np.ndarray:
    crop = Compose([Resize(image_size, InterpolationMode.BICUBIC), CenterCrop(image_size)])
    return np.stack([np.asarray(image) for image, _ in ImageFolder(str(root), crop)])


def _rate(work: Callable[[], object], images: int) -> float:
    started = time.perf_counter()
    work()
    return images / (time.perf_counter() - started)


def _batches(file: Path, mapped: np.ndarray) -> dict[str, float]:
    """Return the milliseconds of the fastest of several batches."""
    in_memory = np.array(mapped)
    rng = np.random.default_rng(0)
    with h5py.File(file) as h5:
        ways = {
            "memory map": lambda rows: mapped[rows],
            "array in memory": lambda rows: in_memory[rows],
            "h5py": lambda rows: h5["images"][np.sort(rows)],
        }
        return {name: min(_milliseconds(way, rng, len(mapped)) for _ in range(REPEATS)) for name, way in ways.items()}


def _milliseconds(way: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator, images: int) -> float:
    rows = rng.permutation(images)[:BATCH]
    started = time.perf_counter()
    way(rows)
    return 1000 * (time.perf_counter() - started)


_PEAK = """
import re, sys
from pathlib import Path
from pipeline.data.datasets import PreparedDataset
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
dataset = PreparedDataset(Path(sys.argv[1]))
before = peak()
dataset.load("train")
print(peak() - before)
"""


def _load_mebibytes(path: Path) -> float:
    """Return how much `load` raises the peak resident memory of a separate process; Linux only."""
    command = [sys.executable, "-c", _PEAK, str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**10


if __name__ == "__main__":
    main()
