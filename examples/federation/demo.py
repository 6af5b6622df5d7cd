"""A demonstration: a federation of three nodes on this machine, each with a private folder of handwritten digits.

    python -m examples.federation.demo [FOLDER]        (make federation-demo)

Every node has its own project folder, its own images (each with other frequent digits), its own copy of the frozen
model and its own feature set. Only Flower's messages are shared: moments for the common basis, then weights.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from examples.federation.loopback import Loopback
from pipeline import manifests, seeding
from pipeline.errors import PipelineError

REPOSITORY = Path(__file__).parents[2]
NAMES = ("hospital-a", "hospital-b", "hospital-c")
SETTINGS: dict[str, Any] = {
    "extract_features.basis": "data/basis.h5",
    "extract_features.basis_images": 100,
    "extract_features.negatives": 4,
    "train_fl.num_clients": 3,
    "train_fl.clients_per_round": 3,
    "train_fl.num_rounds": 3,
    "train_fl.local_epochs": 15,  # every message starts a process on its node, so rounds cost more than epochs
    "train_fl.batch_size": 16,
    "train_fl.learning_rate": 0.02,
    "federation.min_clients": 2,
    "federation.join_timeout": 300.0,
    "federation.round_timeout": 300.0,
}
"""Settings of all nodes and the server that differ from params.yaml; a real project sets them there."""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
def main(folder: Path | None) -> None:
    """Run the demo in FOLDER (default: a temporary folder) and leave all files there."""
    folder = (folder or Path(tempfile.mkdtemp(prefix="federation-"))).resolve()
    try:
        _demo(folder, time.monotonic())
    except PipelineError as error:
        raise click.ClickException(str(error)) from None


def _demo(folder: Path, started: float) -> None:
    def say(text: str) -> None:
        click.secho(f"[{time.monotonic() - started:5.0f} s] {text}", bold=True)

    say(f"creating three private folders of handwritten digits in {folder}")
    projects = make_projects(folder, 200, SETTINGS)
    with Loopback(folder, REPOSITORY) as federation:
        say("starting a SuperLink, and a SuperNode for each folder")
        for client, (name, project) in enumerate(zip(NAMES, projects, strict=True)):
            federation.start_node(client, project, name=name)
        say("federated PCA: the moments of the nodes' maps make one common basis")
        _finish(federation, federation.run(SETTINGS, task="basis"))
        for project in projects:
            say(f"{project.name} extracts its own features on the common basis")
            pipeline(project, "--quiet", "extract-features")
        say(f"FedDifRC over the three nodes, {SETTINGS['train_fl.num_rounds']} rounds")
        _finish(federation, federation.run(SETTINGS, method="feddifrc"))
    results = folder / "server" / "results" / "feddifrc-nodes" / "s0"
    metrics = manifests.read(results / "metrics.json", manifests.RunMetrics)
    say(f"done: accuracy {100 * metrics.final_accuracy:.1f} % (chance: 10 %); results in {results}")


def make_projects(folder: Path, images_each: int, settings: Mapping[str, Any]) -> list[Path]:
    """Create a project folder per node, with its data set and frozen model prepared.

    Args:
        folder: Where to create them, each under its node's name.
        images_each: Training images per node; it has a quarter as many test images.
        settings: Dotted keys of params.yaml and their values.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rng = seeding.numpy_generator(0, "demo")
    class_frequencies = rng.dirichlet(np.full(10, 0.5), len(NAMES))  # which digits are frequent at each node
    free = rng.permutation(len(labels))
    projects = []
    for name, frequencies in zip(NAMES, class_frequencies, strict=True):
        wanted = images_each + images_each // 4
        weights = (frequencies + 0.02)[labels[free]]
        own = rng.choice(len(free), wanted, replace=False, p=weights / weights.sum())
        project = folder / name
        _write_images(project / "images", images[free[own]], labels[free[own]], images_each)
        free = np.delete(free, own)
        write_params(project, settings)
        pipeline(project, "--quiet", "prepare-data")
        pipeline(project, "--quiet", "prepare-backbone")
        projects.append(project)
    return projects


def write_params(project: Path, settings: Mapping[str, Any]) -> None:
    """Write the repository's params.yaml with these values, for a project with images in its folder images/."""
    from ruamel.yaml import YAML

    yaml = YAML()
    values = yaml.load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    for key, value in {"prepare_data.source": "folder", "prepare_data.path": "images", **settings}.items():
        section, name = key.split(".")
        values[section][name] = value
    with (project / "params.yaml").open("w", encoding="utf-8") as stream:
        yaml.dump(values, stream)


def pipeline(project: Path, *words: str) -> None:
    """Run a command of the CLI in a project.

    Raises:
        PipelineError: It fails; the message has its standard error.
    """
    command = [sys.executable, "-m", "pipeline", *words]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    if done.returncode:
        raise PipelineError(f"{project.name}: pipeline {' '.join(words)} failed: {done.stderr.strip()}")


def _write_images(folder: Path, images: np.ndarray, labels: np.ndarray, num_train: int) -> None:
    """Write <split>/<digit>/<number>.png; a digit that a node lacks is an empty folder."""
    from PIL import Image

    for split in ("train", "test"):
        for digit in range(10):
            (folder / split / str(digit)).mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = "train" if number < num_train else "test"
        pixels = (image.reshape(8, 8) / 16 * 255).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(folder / split / str(label) / f"{number:04d}.png")


def _finish(federation: Loopback, run_id: int) -> None:
    """Wait for a run and show its log."""
    status = federation.wait(run_id, 1800)
    click.echo(federation.log(run_id))
    if status != "finished:completed":
        raise PipelineError(f"the run ended as {status}. See the logs in {federation.folder / 'logs'}.")


if __name__ == "__main__":
    main()
