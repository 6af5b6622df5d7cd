"""Stage 1: run every training image through the frozen model once per prompt, into a checked, resumable feature set.

plan.py        what is to be extracted
extraction.py  the computation, on a session of pipeline/diffusion
basis.py       the PCA basis, fitted or shared
latents.py     cached latents
scheduling.py  which process computes which shard
publish.py     the finished set, moved to its place
cost.py        cost estimates
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
from pipeline.diffusion import batching
from pipeline.diffusion.representation import Projector
from pipeline.diffusion.session import FrozenSession
from pipeline.feature_store import Basis, Features, FeatureSetWriter
from pipeline.io import atomic
from pipeline.progress import progress_bar
from pipeline.settings.config import Config
from stages.extract_features import basis, publish, scheduling
from stages.extract_features import plan as planning
from stages.extract_features.extraction import Extraction
from stages.extract_features.latents import LatentCache
from stages.extract_features.plan import ExtractionPlan
from stages.extract_features.scheduling import Claim

log = logging.getLogger(__name__)


def run(config: Config, shard_range: str | None = None, overwrite: bool = False) -> Path:
    """Extract the feature set that params.yaml describes, or some of its shards, resuming an interrupted run.

    Args:
        config: The project's configuration.
        shard_range: "A:B" computes shards A to B - 1 only; the process that finishes the last shard assembles the set.
        overwrite: Replace a finished set that was made from other settings, data or another frozen model.

    Returns:
        The set's folder, or the folder of the unfinished set while shards are missing.

    Raises:
        PipelineError: The data set or the model is missing or changed, the settings do not fit them, or there is
            another finished set at the target.
        SystemExit: 143, on SIGTERM.
    """
    plan = planning.make(config)
    plan.dataset.warn_if_unlike(config.params.prepare_data)
    feature_set = plan.feature_set
    rank, world_size = scheduling.rank_and_world_size()
    shards = scheduling.order_of_shards(feature_set.num_shards, shard_range, rank, world_size)
    if publish.is_complete(plan.target, feature_set):
        atomic.remove_replaced(plan.target)
        log.info("%s is complete already", plan.target)
        return plan.target
    if not overwrite:
        publish.check_replaceable(plan.target, feature_set)
    if rank:
        logging.getLogger("stages").setLevel(logging.WARNING)
    writer = FeatureSetWriter(plan.staging, feature_set, provenance.processor(plan.device))
    with writer.in_use(), scheduling.finish_batch_on_sigterm() as check:

        def compute(shards: list[int]) -> None:
            with batching.reproducible(plan.device, getattr(torch, plan.settings.dtype)):
                _Run(plan, writer, check).compute(shards)

        writer.forget_damaged(shard for shard in shards if shard % world_size == rank)
        if not writer.has_basis() or any(not writer.has_shard(shard) for shard in shards):
            compute(shards)
        return publish.publish(writer, plan.target, compute, overwrite)


def load(
    plan: ExtractionPlan,
    check: Callable[[], None] = lambda: None,
    agree: Callable[[Callable[[], int]], int] = lambda measure: measure(),
) -> Extraction:
    """Load the frozen models for an extraction; see `FrozenSession` for `check` and `agree`."""
    settings = plan.settings
    frozen = plan.model_dir, settings.layers, plan.prompts, settings, plan.runtime, plan.device, plan.image_encoder
    session = FrozenSession(*frozen, check, agree)
    return Extraction(session, plan.dataset.load("train"), plan.settings)


class _Run:
    """The part of an extraction that one process computes."""

    def __init__(self, plan: ExtractionPlan, writer: FeatureSetWriter, check: Callable[[], None]) -> None:
        self._plan, self._writer, self._check = plan, writer, check
        self._extraction = load(plan, check, self._agree_on_batch)
        self._latent_cache = LatentCache(_latents_dir(plan))

    def compute(self, shards: list[int]) -> None:
        """Compute the basis, then the shards: this rank's, other free ones, and those that others did not finish."""
        projector = Projector(self._basis().layers, self._plan.device)
        missing = [shard for shard in shards if not self._writer.has_shard(shard)]
        if len(missing) < len(shards):
            log.info("resuming: %d of %d shards are done", len(shards) - len(missing), len(shards))
        session, shard_rows = self._extraction.session, self._plan.feature_set.shard_rows
        started, images, before = time.perf_counter(), 0, session.passes
        with progress_bar(sum(len(shard_rows(shard)) for shard in missing), "extract", "image") as bar:
            # Only of its own shards does a process claim one ahead: the last free shards are for those that are idle.
            own = scheduling.own_shards(missing, *scheduling.rank_and_world_size())
            for some, wait, ahead in ((own, False, True), (missing, False, False), (missing, True, False)):
                claims = scheduling.claim_missing(self._writer, some, wait, self._check)
                images += self._shards(claims, projector, bar, ahead)
        seconds, passes = time.perf_counter() - started, session.passes - before
        log.info("%d images, %d passes in %.1f s: %.1f images/s", images, passes, seconds, images / seconds)

    def _shards(self, claims: Iterator[Claim], projector: Projector, bar: Any, ahead: bool) -> int:
        """Compute the claimed shards, and return the number of their images.

        With `ahead`, the next shard is claimed and its images are read, and the last shard's file is written meanwhile.
        Not so when locks are waited for: processes that hold one shard while they wait for another could wait for each
        other.
        """
        images = 0
        writing: Future[None] | None = None
        with ThreadPoolExecutor(1, "write") as disk:
            inputs_of = scheduling.prepare(claims, lambda shard: self._extraction.host_input(self._index(shard)), ahead)
            for claim, host in inputs_of:
                inputs = self._extraction.inputs(host, self._latents(claim.shard, host.images))
                index = self._index(claim.shard)
                features, recomputed = self._extraction.represent(index, inputs, projector, bar)
                if writing:
                    writing.result()  # one write at a time bounds the memory, and raises a failed write's error
                writing = disk.submit(self._write, claim, features, recomputed)
                images += len(index)
                if not ahead:
                    writing.result()
            if writing:
                writing.result()
        return images

    def _agree_on_batch(self, measure: Callable[[], int]) -> int:
        if self._plan.device == "cpu" or self._plan.runtime.unet_batch_size != "auto":
            return measure()
        return self._writer.agree_on_batch(measure, self._check)

    def _index(self, shard: int) -> np.ndarray:
        return np.array(self._plan.feature_set.shard_rows(shard))

    def _latents(self, shard: int, images: np.ndarray) -> torch.Tensor:
        cached = self._latent_cache.load(shard)
        if cached is not None:
            return cached.to(self._plan.device)
        latents = self._extraction.session.encode(images)
        self._latent_cache.save(shard, latents)
        return latents

    def _write(self, claim: Claim, features: Features, recomputed: int) -> None:
        with claim.held:
            self._writer.write_shard(claim.shard, features, recomputed)

    def _basis(self) -> Basis:
        """Read the basis; the first process fits it, or copies the shared one."""
        with self._writer.lock("basis", check=self._check):
            if not self._writer.has_basis():
                made = self._make_basis()
                self._writer.write_basis(made, self._extraction.session.model.recomputed)
                for name, share in basis.explained(made).items():
                    dims = len(made.layers[name].components)
                    channels = len(made.layers[name].mean)
                    log.info("basis of %s: %d of %d dims explain %.1f %%", name, dims, channels, 100 * share)
        return self._writer.basis()

    def _make_basis(self) -> Basis:
        plan, content = self._plan, self._plan.feature_set.content
        if plan.shared_basis:
            return basis.read_shared(plan.shared_basis, self._extraction.session.backbone.channels, content.layers)
        index = basis.images(plan.feature_set.rows, plan.settings.basis_images, plan.settings.noise_seed)
        return self._extraction.fit_basis(index)


def _latents_dir(plan: ExtractionPlan) -> Path | None:
    """Return a folder keyed by everything that determines the latents to the last bit; None without the cache."""
    if not plan.runtime.cache_latents:
        return None
    content = plan.feature_set.content
    determining = {
        "version": content.extraction_version,
        "dataset": content.dataset_hash,
        "vae": {name: sha256 for name, sha256 in content.backbone.items() if name.startswith("vae/")},
        "image_size": content.image_size,
        "dtype": content.dtype,
        "rows_per_shard": plan.feature_set.rows_per_shard,
        "processor": provenance.processor(plan.device),
    }
    if plan.device != "cpu":  # where the batch size and the compiler decide which kernels run
        determining |= {"batch": plan.runtime.unet_batch_size, "compile": plan.runtime.compile}
    return plan.state_dir / "latents" / provenance.fingerprint(determining)[:16]
