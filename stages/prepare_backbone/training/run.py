"""A guide, trained with checkpoints: an interrupted training resumes where it was."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from pipeline import provenance
from pipeline.io import locks
from pipeline.io.resumable import ResumableStore
from pipeline.settings.params import GuideTraining
from stages.prepare_backbone.training import samples
from stages.prepare_backbone.training.corpus import Corpus
from stages.prepare_backbone.training.trainer import Machine, Trainer

log = logging.getLogger(__name__)


@contextlib.contextmanager
def trained(
    corpus: Corpus,
    settings: GuideTraining,
    machine: Machine,
    state_dir: Path,
    pictures: Path,
    checkpoint_seconds: float,
) -> Iterator[Trainer]:
    """Train a guide and yield it; its checkpoint is removed at the end of the block, unless there is an error.

    A training resumes from a checkpoint only if nothing changed that determines the weights: settings, images, code,
    torch, and what computes.

    Args:
        corpus: The images.
        settings: prepare_backbone.training.
        machine: Where to compute.
        state_dir: The project's folder of unfinished work.
        pictures: A PNG of samples, replaced every so often.
        checkpoint_seconds: Time between two checkpoints.

    Raises:
        ConfigError: A caption is too long.
        TrainingDiverged: A loss is not a finite number.
        PipelineError: Out of memory, a file cannot be written, or another process does the same training.
    """
    determining = {
        "settings": settings.model_dump(mode="json"),
        "corpus": corpus.sha256,
        "code": provenance.code_sha256(),
        "torch": torch.__version__,
        "device": machine.device,
        "processor": provenance.processor(machine.device),
        "threads": torch.get_num_threads() if machine.device == "cpu" else None,  # sums depend on their number
        "compile": machine.compile,
    }
    key = provenance.fingerprint(determining)[:16]
    store = ResumableStore(state_dir / "guides" / key)

    def draw(pipe: StableDiffusionPipeline, captions: list[str]) -> None:
        samples.write(pictures, samples.draw(pipe, captions))
        log.info("samples: %s", pictures)

    with locks.held(state_dir / "locks" / f"guide-{key}", "a guide with the same settings and images"):
        trainer = Trainer(corpus, settings, machine, store, checkpoint_seconds)
        trainer.train(draw)
        yield trainer
        store.remove()
        store.remove_stale()
