"""Write folders of digits for two presets.

    pipeline prepare-data
    python benchmarks/digit_images.py
    pipeline preset digits-domains --run

data/raw/digit-domains, for `digits-domains`, has two domains, handwritten and rendered from fonts, with as many images
and the same split as the data set `digits`. data/corpus/rendered-digits, for `digits-guides`, has rendered digits to
train a guide on. Both are drawn as for the training of tiny-sd, from other seeds: tiny-sd knows the fonts of the second
domain.
"""

from pathlib import Path

import click
import numpy as np
from PIL import Image

from pipeline import seeding
from pipeline.data.datasets import PreparedDataset
from stages.prepare_backbone.rendered_digits import CLASS_NAMES, render_digits

ROOT = Path(__file__).parents[1]
_CORPUS_IMAGES = 5000


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
@click.option("--project", type=click.Path(path_type=Path), default=ROOT, help="Holds data/datasets/digits.")
def main(project: Path) -> None:
    """Write both folders."""
    write_domains(project, project)
    write_corpus(project)


def write_domains(project: Path, target: Path) -> None:
    """Write data/raw/digit-domains in the folder `target`, from the data set `digits` of a project."""
    dataset = PreparedDataset(project / "data" / "datasets" / "digits")
    folder, rng = target / "data" / "raw" / "digit-domains", seeding.numpy_generator(0, "digit domains")
    for split in ("train", "test"):
        handwritten = dataset.load(split)
        _write(folder / "handwritten" / split, handwritten.images, handwritten.labels, dataset.class_names)
        _write(folder / "rendered" / split, *_rendered(len(handwritten), rng), dataset.class_names)


def write_corpus(project: Path) -> None:
    """Write data/corpus/rendered-digits of a project."""
    images = _rendered(_CORPUS_IMAGES, seeding.numpy_generator(0, "digit corpus"))
    _write(project / "data" / "corpus" / "rendered-digits", *images, CLASS_NAMES)


def _rendered(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    pairs = list(render_digits(count, rng))
    return np.stack([image for image, _ in pairs]), np.array([digit for _, digit in pairs])


def _write(folder: Path, images: np.ndarray, labels: np.ndarray, class_names: list[str]) -> None:
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        file = folder / class_names[label] / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)


if __name__ == "__main__":
    main()
