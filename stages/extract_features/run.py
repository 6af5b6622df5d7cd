"""Runs stage 1: every training image through the frozen model once per prompt, into a checked, resumable feature set.

pipeline/diffusion  the frozen model under its prompts, batches, and maps -> PCA -> pooled representation
plan.py             what is to be extracted
extraction.py       the computation
basis.py            the PCA basis, fitted or shared
latents.py          latents kept for the next extraction
publish.py          the finished set in its place
scheduling.py       who computes which shard
cost.py             what it will cost
ledger.py           what it did cost
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import provenance
from pipeline.diffusion import backbones, batching, image_conditioning
from pipeline.diffusion.representation import Projector
from pipeline.feature_store import Basis, Features, FeatureSetWriter
from pipeline.io import atomic
from pipeline.progress import progress_bar
from pipeline.settings.config import Config
from stages.extract_features import basis as pca
from stages.extract_features import plan as planning
from stages.extract_features import publish, scheduling
from stages.extract_features.extraction import Extraction, HostInput
from stages.extract_features.latents import LatentCache
from stages.extract_features.ledger import Ledger
from stages.extract_features.plan import Job
from stages.extract_features.scheduling import Claim

log = logging.getLogger(__name__)


def run(config: Config, shard_range: str | None = None, overwrite: bool = False) -> Path:
    """Extracts the feature set that params.yaml describes, or some shards of it, continuing where a killed run stopped.

    Args:
        config: the project's configuration.
        shard_range: "A:B" computes shards A to B - 1 only; whoever finishes the last one puts the set together.
        overwrite: replace a finished set that other settings, data or another frozen model gave.

    Returns:
        The set's folder; the folder in which it is being made if shards are missing still.

    Raises:
        PipelineError: the data set or the backbone is missing or changed, the configuration does not fit them, or
            another finished set stands in the place.
        SystemExit: 143, on SIGTERM.
    """
    job = planning.make(config)
    target = config.features_dir
    rank, world_size = scheduling.rank_and_world_size()
    shards = scheduling.order_of_shards(job.plan.num_shards, shard_range, rank, world_size)
    if publish.is_complete(target, job.plan):
        atomic.remove_replaced(target)
        log.info("%s is complete already", target)
        return target
    if not overwrite:
        publish.check_replaceable(target, job.plan)
    if rank:
        logging.getLogger("stages").setLevel(logging.WARNING)
    staging = config.state_dir / "staging" / f"{job.plan.content.fingerprint[:16]}-{job.plan.rows_per_shard}"
    writer = FeatureSetWriter(staging, job.plan, provenance.processor(job.device))
    with writer.in_use(), scheduling.finish_batch_on_sigterm() as check:

        def compute(shards: list[int]) -> None:
            with batching.reproducible(job.device, getattr(torch, config.params.extract_features.dtype)):
                _Run(job, writer, check).all(shards)

        writer.forget_damaged(shard for shard in shards if shard % world_size == rank)
        if not writer.has_basis() or any(not writer.has_shard(shard) for shard in shards):
            compute(shards)
        return publish.deliver(writer, target, compute, overwrite)


def load(job: Job, check: Callable[[], None] = lambda: None) -> Extraction:
    """Loads the frozen models and makes them ready for the job's data set."""
    params = job.config.params.extract_features
    backbone = backbones.load(job.config.backbone_dir, params.layers, job.device, getattr(torch, params.dtype))
    encoder = image_conditioning.load(job.config, job.device)
    data = job.dataset.load("train")
    return Extraction(backbone, encoder, job.prompts, params, job.config.params.runtime, data, check)


class _Run:
    """One process's part of an extraction."""

    def __init__(self, job: Job, writer: FeatureSetWriter, check: Callable[[], None]) -> None:
        self._job, self._writer, self._check = job, writer, check
        self._extraction = load(job, check)
        self._cache = LatentCache(_latents_dir(job))
        self._ledger = Ledger(job.config.state_dir, job.config.features_dir.name, job.plan.content.fingerprint)

    def all(self, shards: list[int]) -> None:
        """The basis, then the shards: first those that nobody holds, then those that others did not finish."""
        plan = self._job.plan
        projector = Projector(self._basis().layers, self._job.device)
        missing = [shard for shard in shards if not self._writer.has_shard(shard)]
        if len(missing) < len(shards):
            log.info("resuming: %d of %d shards are done", len(shards) - len(missing), len(shards))
        started, images, before = time.perf_counter(), 0, self._extraction.passes
        with progress_bar(sum(len(plan.shard_rows(shard)) for shard in missing), "extract", "image") as bar:
            for wait in (False, True):
                claims = scheduling.claim_missing(self._writer, missing, wait, self._check)
                images += self._shards(claims, projector, bar, ahead=not wait)
        seconds = time.perf_counter() - started
        passes = self._extraction.passes - before
        log.info("%d images, %d passes in %.1f s: %.1f images/s", images, passes, seconds, images / seconds)

    def _shards(self, claims: Iterator[Claim], projector: Projector, bar: Any, ahead: bool) -> int:
        """Computes the claimed shards; the next one's images are read and the last one's file written meanwhile.

        Not `ahead` of locks that are waited for: who holds one shard while waiting for another may wait for ever.
        """
        images = 0
        writing: Future[None] | None = None
        with ThreadPoolExecutor(1, "write") as disk:
            for claim, host in scheduling.prepare(claims, self._host_input, ahead):
                index, before = np.array(self._job.plan.shard_rows(claim.shard)), self._extraction.passes
                latents = self._latents(claim.shard, host.images)
                features, redone = self._extraction.represent(
                    index, self._extraction.inputs(host, latents), projector, bar
                )
                if writing:
                    writing.result()
                writing = disk.submit(self._write, claim, features, redone, self._extraction.passes - before)
                images += len(index)
                if not ahead:
                    writing.result()
            if writing:
                writing.result()
        return images

    def _host_input(self, shard: int) -> HostInput:
        return self._extraction.host_input(np.array(self._job.plan.shard_rows(shard)))

    def _latents(self, shard: int, images: np.ndarray) -> torch.Tensor:
        cached = self._cache.load(shard)
        if cached is not None:
            return torch.from_numpy(cached).to(self._job.device)
        latents = self._extraction.encode(images)
        self._cache.save(shard, latents.cpu().numpy())
        return latents

    def _write(self, claim: Claim, features: Features, redone: int, passes: int) -> None:
        with claim.held:
            self._writer.write_shard(claim.shard, features, redone)
        self._ledger.enter(f"shard-{claim.shard:05d}.h5", passes)

    def _basis(self) -> Basis:
        """Reads the basis; the first process to come fits it, or takes the one given from elsewhere."""
        with self._writer.lock("basis", check=self._check):
            if not self._writer.has_basis():
                basis = self._make_basis()
                self._writer.write_basis(basis, self._extraction.redone)
                self._ledger.enter("basis.h5", self._extraction.passes)
                for name, share in pca.explained(basis).items():
                    dims = len(basis.layers[name].components)
                    log.info("basis of %s: %d dims explain %.1f %%", name, dims, 100 * share)
        return self._writer.basis()

    def _make_basis(self) -> Basis:
        params, plan = self._job.config.params.extract_features, self._job.plan
        if shared := planning.shared_basis(self._job.config):
            return pca.read_shared(shared, self._extraction.backbone.channels, plan.content.layers)
        return self._extraction.fit_basis(pca.images(plan.rows, params.basis_images, params.noise_seed))


def _latents_dir(job: Job) -> Path | None:
    """One folder per data set, VAE, image size, shard size and whatever else decides the latents' last bits."""
    if not job.config.params.runtime.cache_latents:
        return None
    content = job.plan.content
    deciding = {
        "version": content.extraction_version,
        "dataset": content.dataset_hash,
        "vae": {name: sha256 for name, sha256 in content.backbone.items() if name.startswith("vae/")},
        "image_size": content.image_size,
        "dtype": content.dtype,
        "rows_per_shard": job.plan.rows_per_shard,
        "processor": provenance.processor(job.device),
    }
    return job.config.state_dir / "latents" / provenance.fingerprint(deciding)[:16]
