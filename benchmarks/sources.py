"""Measure prepare-data from a tree of files, tars, Parquet and an Arrow stream: images per second and peak memory.

The same small JPEG files, 1,000 distinct ones of noise that repeat, are written in each format, 10,000 per file of it;
a tree has links to them. Each source is prepared by a process of its own, whose largest resident memory is reported:
it must not grow with the data set. Prints a table, then one JSON line. Formats are written to a temporary folder, one
at a time (TMPDIR chooses the disk: 5 GB for 600,000 images).

    python benchmarks/sources.py --images 10000 --images 60000 --images 600000
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from pipeline import provenance

REPOSITORY = Path(__file__).resolve().parents[1]
PER_FILE = 10_000
CLASSES = 10
SCHEMA = pa.schema(
    [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
).with_metadata({"huggingface": "{}"})


@click.command()
@click.option("--images", "counts", type=int, multiple=True, default=(2000,), help="Training images; may be repeated.")
@click.option("--side", default=32, help="Height and width of the images in pixels, and of the prepared ones.")
@click.option("--source", "sources", multiple=True, help="Only these sources; may be repeated.")
def main(counts: tuple[int, ...], side: int, sources: tuple[str, ...]) -> None:
    """Print images per second and mebibytes of memory for each source and number of images."""
    files = _jpegs(side)
    found = []
    for source, write in WRITERS.items():
        for count in counts:
            if sources and source not in sources:
                continue
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                for split, number in (("train", count), ("test", max(CLASSES, count // 100))):
                    write(root / "in", split, files, number)
                seconds, mebibytes = _prepare(root, source, side)
            total = count + max(CLASSES, count // 100)
            found.append({"source": source, "images": count, "images_per_second": total / seconds, "peak": mebibytes})
            click.echo(f"{source:12} {count:>10,} images {total / seconds:10.0f} images/s {mebibytes:8.0f} MiB at most")
    click.echo(json.dumps({"runs": found, "side": side, "hardware": provenance.describe("cpu")}))


def _jpegs(side: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for _ in range(1000):
        small = Image.fromarray(rng.integers(0, 256, (max(1, side // 4), max(1, side // 4), 3), np.uint8))
        stream = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(stream, "jpeg", quality=90)
        files.append(stream.getvalue())
    return files


def _parts(count: int) -> Iterator[range]:
    """Yield the images of each file of a format."""
    return (range(start, min(start + PER_FILE, count)) for start in range(0, count, PER_FILE))


def _write_tree(root: Path, split: str, files: list[bytes], count: int) -> None:
    originals = [root.parent / f"{split}-{number}.jpg" for number in range(len(files))]
    for original, content in zip(originals, files, strict=True):
        original.write_bytes(content)
    for label in range(CLASSES):
        (root / split / f"class {label}").mkdir(parents=True)
    for number in range(count):
        # Files of a tree are links, each at most 60,000 times, because file systems limit links to one file.
        os.link(originals[number % len(files)], root / split / f"class {number % CLASSES}" / f"{number:08d}.jpg")


def _write_tars(root: Path, split: str, files: list[bytes], count: int) -> None:
    (root / split).mkdir(parents=True)
    for place, part in enumerate(_parts(count)):
        with tarfile.open(root / split / f"{place:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in part:
                for field, content in (("jpg", files[number % len(files)]), ("cls", b"%d" % (number % CLASSES))):
                    member = tarfile.TarInfo(f"{number:08d}.{field}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            tar.members = []


def _table(files: list[bytes], part: range) -> pa.Table:
    images = [{"bytes": files[number % len(files)], "path": None} for number in part]
    return pa.table([pa.array(images, SCHEMA.types[0]), pa.array([number % CLASSES for number in part])], SCHEMA)


def _write_parquet(root: Path, split: str, files: list[bytes], count: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for place, part in enumerate(_parts(count)):  # one row group per file, which is hard on the reader
        parquet.write_table(_table(files, part), root / f"{split}-{place:05d}.parquet", row_group_size=PER_FILE)


def _write_arrow(root: Path, split: str, files: list[bytes], count: int) -> None:
    (root / split).mkdir(parents=True)
    names = []
    for place, part in enumerate(_parts(count)):
        names.append({"filename": f"data-{place:05d}.arrow"})
        with pa.ipc.new_stream(str(root / split / names[-1]["filename"]), SCHEMA) as stream:
            stream.write_table(_table(files, part), 100)  # the batches that datasets writes for images
    (root / split / "state.json").write_text(json.dumps({"_data_files": names}))
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))


WRITERS: dict[str, Callable[[Path, str, list[bytes], int], None]] = {
    "folder": _write_tree,
    "webdataset": _write_tars,
    "parquet": _write_parquet,
    "hf-dataset": _write_arrow,
}

_RUN = """
import sys
from pathlib import Path
import stages.train_fl.methods
from pipeline import memory
from pipeline.settings import config
from stages import prepare_data
source, path, size = sys.argv[1:]
keys = {"name": "made", "source": source, "path": path, "image_size": int(size), "train_subset": None}
prepare_data.run(config.load(Path("params.yaml"), {f"prepare_data.{key}": value for key, value in keys.items()}))
print(memory.peak() // 1024)
"""


def _prepare(root: Path, source: str, side: int) -> tuple[float, float]:
    """Return the seconds and the peak resident MiB of a process that prepares `root`/in; Linux only."""
    project = root / "project"
    project.mkdir()
    (project / "params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
    command = [sys.executable, "-c", _RUN, source, str(root / "in"), str(side)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    started = time.perf_counter()
    done = subprocess.run(command, check=True, cwd=project, env=environment, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - started, int(done.stdout) / 2**10


if __name__ == "__main__":
    main()
