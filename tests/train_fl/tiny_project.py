"""A project small enough to train in a test: 48 images of 8x8 pixels, three classes, two domains."""

from pathlib import Path

import numpy as np

from pipeline.data import datasets
from pipeline.data.datasets import Images, Source
from pipeline.diffusion import prompts
from pipeline.feature_store import Basis, Content, Features, FeatureSetWriter, LayerBasis, Plan
from pipeline.settings import config

CLASSES = ["round", "square", "flat"]
SIZE, DIMS = 8, 6

OVERRIDES = {
    "prepare_data.name": "tiny",
    "prepare_data.image_size": SIZE,
    "extract_features.dims": [DIMS],
    "extract_features.negative_words": "words.txt",
    "train_fl.num_clients": 4,
    "train_fl.clients_per_round": 2,
    "train_fl.num_rounds": 4,
    "train_fl.local_epochs": 1,
    "train_fl.batch_size": 8,
    "runtime.checkpoint_every": 1,
    "runtime.workers": 2,
    "partitions": {"iid": {"kind": "iid"}, "dir": {"kind": "dirichlet", "alpha": 0.5, "min_samples": 1}},
}


def images(count: int, seed: int) -> Images:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pixels = rng.integers(0, 80, (count, SIZE, SIZE, 3)) + 70 * labels[:, None, None, None]
    return Images(pixels.astype(np.uint8), labels.astype(np.int64), (np.arange(count) % 2).astype(np.int64))


def make(root: Path, **overrides) -> config.Config:
    """A project in `root`; dots in keys are written as `__`."""
    repository = Path(__file__).parents[2]
    (root / "params.yaml").write_text((repository / "params.yaml").read_text())
    (root / "words.txt").write_text("sun\nmoon\n")
    changes = OVERRIDES | {key.replace("__", "."): value for key, value in overrides.items()}
    changes.setdefault("sweep.partitions", list(changes["partitions"]))
    made = config.load(root / "params.yaml", changes)
    splits = {"train": images(48, 0), "test": images(24, 1)}
    datasets.write(made.dataset_dir, "tiny", "test", Source(CLASSES, splits, "none", ["left", "right"]))
    return made


def content(project: config.Config) -> Content:
    """The manifest content of a set with the project's settings and made-up layers."""
    params, dataset = project.params.extract_features, datasets.PreparedDataset(project.dataset_dir)
    made = prompts.build(params, dataset.class_names, project.path)
    return Content(
        extraction_version=params.version,
        dataset_hash=dataset.hash,
        class_names=dataset.class_names,
        backbone={},
        layers={"up_blocks.1": [0, DIMS]},
        prompts=made.texts,
        positive=made.positive,
        image_conditioning=None,
        basis_images=params.basis_images,
        basis_sha256=None,
        **params.model_dump(include={"timestep", "image_size", "denoise_prompt", "negatives", "noise_seed", "dtype"}),
    )


def add_features(project: config.Config, same: tuple[int, ...] = (), settings: dict | None = None, **changes) -> None:
    """Random representations of the training images under one prompt per class, the image's own among them.

    The prompts `same` give equal representations. `changes` replace values of the set's content, and `settings`
    those in its provenance; None omits them, as older versions did.
    """
    train = datasets.PreparedDataset(project.dataset_dir).load("train")
    stated = Content(**content(project).model_dump() | changes)
    made_with = {} if settings is None else {"settings": project.params.extract_features.model_dump() | settings}
    plan = Plan(stated, len(train), 20, made_with)
    writer = FeatureSetWriter(project.state_dir / "features", plan, "test")
    layer = LayerBasis(np.zeros(DIMS), np.eye(DIMS), np.ones(DIMS), float(DIMS))
    writer.write_basis(Basis({"up_blocks.1": layer}, np.zeros(DIMS), np.ones(DIMS)))
    rng = np.random.default_rng(0)
    for shard in writer.missing_shards:
        index = np.array(plan.shard_rows(shard))
        denoised = rng.random((len(index), DIMS)).astype(np.float16)
        prompted = rng.random((len(index), 3, DIMS)).astype(np.float16)
        prompted[:, list(same)] = prompted[:, list(same[:1])]
        classes = np.tile(np.arange(3, dtype=np.int16), (len(index), 1))
        writer.write_shard(shard, Features(index, train.labels[index], denoised, prompted, classes), 0)
    writer.publish(project.features_dir)
