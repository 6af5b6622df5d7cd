"""Write digits in two domains, handwritten and rendered from fonts, as a tree for `domain-folder`.

    pipeline prepare-data
    python benchmarks/digit_domains.py
    pipeline preset digits-domains --run

Both domains have as many images, and the same split into training and test images, as the data set `digits`. Rendered
digits are drawn as for the training of tiny-sd, but with another seed: the guide knows this domain's fonts.
"""

from pathlib import Path

import click
import numpy as np
from PIL import Image

from pipeline import seeding
from pipeline.data.datasets import PreparedDataset
from stages.prepare_backbone.rendered_digits import render_digits

ROOT = Path(__file__).parents[1]


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
@click.option("--project", type=click.Path(path_type=Path), default=ROOT, help="Holds data/datasets/digits.")
def main(project: Path) -> None:
    """Write both domains."""
    write(project)


def write(project: Path) -> None:
    """Write data/raw/domain-folder of a project."""
    dataset = PreparedDataset(project / "data" / "datasets" / "digits")
    folder, rng = project / "data" / "raw" / "domain-folder", seeding.numpy_generator(0, "digit domains")
    for split in ("train", "test"):
        handwritten = dataset.load(split)
        _write(folder / "handwritten" / split, handwritten.images, handwritten.labels, dataset.class_names)
        rendered = list(render_digits(len(handwritten), rng))
        drawn, digits = np.stack([image for image, _ in rendered]), np.array([digit for _, digit in rendered])
        _write(folder / "rendered" / split, drawn, digits, dataset.class_names)


def _write(folder: Path, images: np.ndarray, labels: np.ndarray, class_names: list[str]) -> None:
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        file = folder / class_names[label] / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)


if __name__ == "__main__":
    main()
