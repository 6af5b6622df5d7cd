"""Runs one federated run: data, partition, model, method, engine -> results/<run>.

rounds.csv         one row a round: accuracy and loss held out, training losses; equal seeds give equal bytes
partition.json     every client's samples and label counts
model.safetensors  the last global weights
config.json        the resolved settings, the hashes of data set and features, software and hardware
metrics.json       final, best and mean-of-last-five accuracy; seconds and samples per second
"""

import csv
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pipeline import provenance, seeding
from pipeline.config import Config
from pipeline.datasets import Images, PreparedDataset, stratified_split
from pipeline.errors import PipelineError
from pipeline.feature_store import FeatureSet
from pipeline.params import Guidance as GuidanceParams
from pipeline.progress import progress_bar
from stages.train_fl import methods, models, partition
from stages.train_fl.client_data import ClientData, Guidance
from stages.train_fl.engines import local
from stages.train_fl.evaluate import evaluate
from stages.train_fl.methods.feddifrc import columns, prepare

log = logging.getLogger(__name__)


def run(config: Config, method_name: str, partition_name: str, seed: int) -> Path:
    """Trains one method on one partition with one seed.

    Returns:
        The run's folder.

    Raises:
        PipelineError: a name is unknown, data or features are missing or do not belong together, or training diverged.
    """
    params = config.params.train_fl
    method_params = config.settings("methods", method_name)
    partition_params = config.settings("partitions", partition_name)
    torch.use_deterministic_algorithms(True)
    dataset = PreparedDataset(config.dataset_dir)
    device = _device(config.params.runtime.device)
    train, train_index, held_out = _split(dataset, config, seed)
    guidance_params = methods.guidance_of(method_params)
    features = _features(config, dataset) if guidance_params else None
    parts = partition.dirichlet(
        train.labels,
        params.num_clients,
        rng=seeding.numpy_generator(seed, "partition"),
        **partition_params.model_dump(exclude={"kind"}),
    )
    everyone = _client_data(train, train_index, features, guidance_params)
    model = models.build(
        params.model,
        len(dataset.class_names),
        seed,
        len(columns(guidance_params, features.manifest.content.layers)) if features and guidance_params else None,
        params.projection_dim,
        **methods.model_parts(method_params),
    ).to(device)
    method = methods.build(method_params, model, params.momentum, params.weight_decay, params.num_clients)
    clients = [everyone.take(torch.from_numpy(part)).to(device) for part in parts]
    test_images, test_labels = _tensors(held_out)
    test_images, test_labels = test_images.to(device), test_labels.to(device)

    path = config.run_dir(method_name, partition_name, seed)
    path.mkdir(parents=True, exist_ok=True)
    _write_partition(path, parts, train, train_index, dataset.class_names)
    schedule = local.Schedule(
        params.num_rounds,
        params.clients_per_round,
        params.local_epochs,
        params.batch_size,
        params.learning_rate,
        params.augmentation,
        seed,
    )
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    seconds = {"train": 0.0, "aggregate": 0.0, "evaluate": 0.0}
    samples = 0
    with progress_bar(params.num_rounds, path.name, "round") as bar:
        for done in local.run(method, weights, clients, schedule):
            weights = done.weights
            clock = time.perf_counter()
            model.load_state_dict(weights)
            scores = evaluate(model, test_images, test_labels)
            seconds["evaluate"] += time.perf_counter() - clock
            seconds["train"] += done.train_seconds
            seconds["aggregate"] += done.aggregate_seconds
            samples += done.num_samples
            rows.append(
                {"round": done.number, **scores, **{f"train_{k}": v for k, v in done.train_metrics.items()}}
                | {"num_clients": len(done.participants), "num_samples": done.num_samples}
            )
            _write_rounds(path / "rounds.csv", rows)
            bar.set_postfix_str(f"accuracy {scores['accuracy']:.3f}")
            bar.update()
    save_file({name: value.cpu().contiguous() for name, value in weights.items()}, path / "model.safetensors")
    provenance.write_json(
        path / "config.json",
        {
            "method": {"name": method_name, **method_params.model_dump()},
            "partition": {"name": partition_name, **partition_params.model_dump()},
            "seed": seed,
            "train_fl": params.model_dump(),
            "dataset": {"name": dataset.name, "hash": dataset.hash},
            "features": features.manifest.fingerprint if features else None,
            "provenance": provenance.describe(device),
        },
    )
    accuracies = [row["accuracy"] for row in rows]
    metrics = {
        "final_accuracy": accuracies[-1],
        "best_accuracy": max(accuracies),
        "mean_last5_accuracy": float(np.mean(accuracies[-5:])),
        "wall_seconds": time.perf_counter() - started,
        "samples_per_second": samples / seconds["train"],
        "seconds": seconds,
    }
    provenance.write_json(path / "metrics.json", metrics)
    log.info("%s: accuracy %.4f (mean of last five rounds)", path.name, metrics["mean_last5_accuracy"])
    return path


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PipelineError(f"runtime.device = {name}: this machine has no usable CUDA GPU; use auto or cpu")
    return name


def _split(dataset: PreparedDataset, config: Config, seed: int) -> tuple[Images, np.ndarray, Images]:
    """The images clients train on, their positions in the training split, and the images held out."""
    params = config.params.train_fl
    train = dataset.load("train")
    if params.evaluate_on == "test":
        return train, np.arange(len(train)), dataset.load("test")
    rng = seeding.numpy_generator(seed, "validation split")
    count = max(1, round(params.validation_fraction * len(train)))
    held_out, kept = stratified_split(train.labels, count, rng)
    return train.take(kept), kept, train.take(held_out)


def _features(config: Config, dataset: PreparedDataset) -> FeatureSet:
    features = FeatureSet(config.features_dir)
    if features.manifest.content.dataset_hash != dataset.hash:
        raise PipelineError(
            f"{features.path} was extracted from another data set (hash "
            f"{features.manifest.content.dataset_hash[:12]}) than {dataset.path} (hash {dataset.hash[:12]}): "
            "run `pipeline extract-features`"
        )
    return features


def _client_data(
    train: Images, train_index: np.ndarray, features: FeatureSet | None, guidance: GuidanceParams | None
) -> ClientData:
    images, labels = _tensors(train)
    if features is None or guidance is None:
        return ClientData(images, labels)
    rows = features.read(train_index)
    if not np.array_equal(rows.label, train.labels):
        raise PipelineError(f"{features.path}: labels differ from the data set's: run `pipeline extract-features`")
    cached = Guidance(
        torch.from_numpy(rows.denoised),
        torch.from_numpy(rows.prompted),
        torch.from_numpy(features.positive_prompts(rows)),
    )
    basis, layers = features.basis(), features.manifest.content.layers
    mean, std = torch.from_numpy(basis.mean), torch.from_numpy(basis.std)
    return ClientData(images, labels, prepare(cached, guidance, layers, mean, std))


def _tensors(data: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (N, 3, H, W) and int64 (N,)."""
    return torch.from_numpy(np.ascontiguousarray(data.images.transpose(0, 3, 1, 2))), torch.from_numpy(data.labels)


def _write_partition(
    path: Path, parts: list[np.ndarray], train: Images, train_index: np.ndarray, class_names: list[str]
) -> None:
    counts = partition.label_counts(parts, train.labels, len(class_names))
    provenance.write_json(
        path / "partition.json",
        {
            "class_names": class_names,
            "label_counts": counts.tolist(),
            "clients": [train_index[part].tolist() for part in parts],
        },
    )


def _write_rounds(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rounds so far, through a temporary name: a killed run leaves whole rows."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
