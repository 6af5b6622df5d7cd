"""Move a finished set to its place, never over another set without --overwrite, and never with a damaged file.

The shards of a set may stay in staging for days, made by many jobs. Each is hashed again before the set is published,
which takes seconds where computing them took hours.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from pipeline import feature_store, provenance
from pipeline.errors import FeatureSetError, PipelineError
from pipeline.feature_store import FeatureSetWriter, Manifest, Plan
from pipeline.feature_store.writer import count_finished
from pipeline.io import atomic
from pipeline.io.system_errors import SystemRefusal, reading, status
from pipeline.settings.config import differing_keys
from stages.extract_features import basis

log = logging.getLogger(__name__)


def publish(writer: FeatureSetWriter, target: Path, recompute: Callable[[list[int]], None], overwrite: bool) -> Path:
    """Assemble the set if all its shards are finished and no other process has done so.

    `recompute` computes shards again that were damaged after they were written. `overwrite` replaces a finished set of
    other features, an error otherwise. Return `target`, or the unfinished set's folder while shards are missing.
    """
    if missing := writer.missing_shards:
        log.info("%d of %d shards are still missing", len(missing), writer.plan.num_shards)
        return writer.path
    with writer.lock("set"):
        if not is_complete(target, writer.plan):
            if not overwrite:
                check_replaceable(target, writer.plan)
            writer.forget_damaged(range(writer.plan.num_shards))
            if damaged := writer.missing_shards:
                recompute(damaged)
            atomic.write_text(writer.path / "explained_variance.svg", basis.plot_explained_variance(writer.basis()))
            writer.publish(target)
            writer.remove_published_siblings()
    return target


def is_complete(target: Path, plan: Plan) -> bool:
    """Return whether the set exists and every checksum matches; damage is logged as a warning.

    Raise SystemRefusal if the system refuses to read a file, so that it is unknown.
    """
    if status(target / "manifest.json") is None:
        return False
    try:
        found = feature_store.FeatureSet(target)
        if not _is_of(plan, found.manifest):
            return False
        found.verify_files()
    except SystemRefusal:
        raise
    except PipelineError as error:
        log.warning("the existing feature set %s cannot be used: %s", target, getattr(error, "problem", error))
        return False
    return True


def in_place(target: Path, staging: Path, plan: Plan, overwrite: bool) -> tuple[str, int]:
    """Return what a run would find, in words, and how many of its shards are finished. Writes and hashes nothing.

    If a run would compute nothing, the number is 0: the cost to be estimated is then that of a whole set.

    Raise SystemRefusal if the system refuses to read a file.
    """
    if _has_manifest_of(target, plan):
        return f"{target} holds this set: a run only checks it (the time is that of a new set)", 0
    found = []
    try:
        check_replaceable(target, plan)
    except FeatureSetError as error:
        if not overwrite:
            return f"a run would end at once (the time is with --overwrite): {error}", 0
        found = [f"{target} holds another set, which a run replaces"]
    done = count_finished(staging, plan)
    if done == plan.num_shards:
        found.append(f"all {done} shards are finished: a run puts the set together (the time is that of a new set)")
        done = 0
    elif done:
        found.append(f"{done} of {plan.num_shards} shards are finished: a run computes the others")
    return "; ".join(found), done


def _has_manifest_of(target: Path, plan: Plan) -> bool:
    try:
        return _is_of(plan, feature_store.read_manifest(target))
    except SystemRefusal:
        raise
    except PipelineError:
        return False


def _is_of(plan: Plan, found: Manifest) -> bool:
    return (found.fingerprint, found.rows_per_shard) == (plan.content.fingerprint, plan.rows_per_shard)


def check_replaceable(target: Path, plan: Plan) -> None:
    """Raise FeatureSetError, which names what differs, if publishing would replace a finished set of other features."""
    file = target / "manifest.json"
    try:
        with reading(file):
            found = json.loads(file.read_bytes())
        content, fingerprint = found["content"], found["fingerprint"]
        intact = fingerprint == provenance.fingerprint(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # no finished set
    if intact and fingerprint != plan.content.fingerprint:
        wanted = plan.content.model_dump()
        # Each call lists the keys of its second argument.
        keys = [*differing_keys(content, wanted), *differing_keys(wanted, content)]
        differing = dict.fromkeys(key.partition(".")[0] for key in keys) or ["number format"]  # 1 equals 1.0 and true
        raise FeatureSetError(
            f"{target} holds a finished feature set of other settings or data ({', '.join(differing)}). Move or delete "
            "the folder, give this set another name (prepare_data.name or prepare_backbone.name), or pass --overwrite."
        )
