"""Puts a finished set in its place: never over another set unasked, and never with a byte that is not what was written.

The shards of a set may lie in staging for days, made by many jobs; each is hashed once more before the set is given
out, which takes seconds where computing them took hours.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from pipeline import feature_store, provenance
from pipeline.errors import PipelineError
from pipeline.feature_store import FeatureSetWriter, Plan
from pipeline.io.system_errors import SystemRefusal, reading, status
from pipeline.settings.config import differing_keys
from stages.extract_features import basis

log = logging.getLogger(__name__)


def publish(writer: FeatureSetWriter, target: Path, again: Callable[[list[int]], None], overwrite: bool) -> Path:
    """Puts the set together if all its shards are there and nobody has done so.

    Args:
        writer: of the set in the making.
        target: the set's place.
        again: computes these shards: those that were damaged after they were written.
        overwrite: replace a finished set of other features.

    Returns:
        The set's folder; the folder in which it is being made if shards are missing still.

    Raises:
        PipelineError: another finished set stands there, or the disk is full.
    """
    if missing := writer.missing_shards:
        log.info("%d of %d shards are missing still", len(missing), writer.plan.num_shards)
        return writer.path
    with writer.lock("set"):
        if not is_complete(target, writer.plan):
            if not overwrite:
                check_replaceable(target, writer.plan)
            writer.forget_damaged(range(writer.plan.num_shards))
            if damaged := writer.missing_shards:
                again(damaged)
            basis.plot_explained_variance(writer.basis(), writer.path / "explained_variance.svg")
            writer.publish(target)
            writer.drop_delivered_neighbours()
    return target


def is_complete(target: Path, plan: Plan) -> bool:
    """Whether the set is there whole, by every file's checksum; a warning says what is damaged.

    Raises:
        SystemRefusal: the operating system did not let a file be read, so that it is not known.
    """
    if status(target / "manifest.json") is None:
        return False
    try:
        found = feature_store.FeatureSet(target)
        if (found.manifest.fingerprint, found.manifest.rows_per_shard) != (
            plan.content.fingerprint,
            plan.rows_per_shard,
        ):
            return False
        found.verify_files()
    except SystemRefusal:
        raise
    except PipelineError as error:
        log.warning("the set there cannot be used: %s", str(error).partition(": delete it")[0])
        return False
    return True


def check_replaceable(target: Path, plan: Plan) -> None:
    """Checks that no finished set of other features is there, which would be lost; whole or in part.

    Raises:
        PipelineError: one is; names what differs. Or the operating system does not say what is there.
    """
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
        keys = [*differing_keys(content, wanted), *differing_keys(wanted, content)]  # each lists its second's keys
        differing = dict.fromkeys(key.partition(".")[0] for key in keys) or ["number format"]  # 1 equals 1.0 and true
        raise PipelineError(
            f"{target} holds a finished feature set with another {', '.join(differing)}: move or delete the folder, "
            "give this set another name (prepare_data.name or prepare_backbone.name), or say --overwrite"
        )
