"""Distribute shards over processes, on one machine or many, and stop without losing work.

`accelerate launch -m pipeline extract-features` (or torchrun) starts one process per GPU and sets its rank; every
process begins with the shards of its rank and then helps with the rest. Batch queues instead give each job a
`--shard-range`. Processes do not communicate: a lock claims a shard, which the system releases if its holder dies, and
a file finishes it. The content of a shard does not depend on the process that computes it.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from pipeline import threads
from pipeline.errors import ConfigError
from pipeline.feature_store import FeatureSetWriter
from pipeline.sigterm import Terminated, on_sigterm

T = TypeVar("T")


class Claim(NamedTuple):
    """A missing shard that this process holds; closing `held` releases it."""

    shard: int
    held: contextlib.ExitStack


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes, as set by accelerate or torchrun; (0, 1) otherwise."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def order_of_shards(num_shards: int, shard_range: str | None, rank: int, world_size: int) -> list[int]:
    """Return the shards to compute, those of this rank first; "A:B" selects shards A to B - 1, None all."""
    shards = range(num_shards)
    if shard_range is not None:
        parts = re.fullmatch(r"(\d+):(\d+)", shard_range)
        if not parts or not int(parts[1]) < int(parts[2]) <= num_shards:
            raise ConfigError(
                f"--shard-range {shard_range} is invalid. Use A:B with 0 <= A < B <= {num_shards} shards."
            )
        shards = shards[int(parts[1]) : int(parts[2])]
    return sorted(shards, key=lambda shard: ((shard - rank) % world_size != 0, shard))


def own_shards(shards: list[int], rank: int, world_size: int) -> list[int]:
    """Return the shards that this rank computes first. Only of these may it claim one ahead."""
    return [shard for shard in shards if shard % world_size == rank]


def claim_missing(
    writer: FeatureSetWriter, shards: list[int], wait: bool, check: Callable[[], None]
) -> Iterator[Claim]:
    """Claim the missing shards one by one; those that other processes hold are skipped, or waited for."""
    for shard in shards:
        if writer.has_shard(shard):
            continue
        held = contextlib.ExitStack()
        if held.enter_context(writer.lock(f"shard-{shard:05d}", wait, check)) and not writer.has_shard(shard):
            yield Claim(shard, held)
        else:
            held.close()


def prepare(claims: Iterator[Claim], read: Callable[[int], T], ahead: bool) -> Iterator[tuple[Claim, T]]:
    """Call `read` for each claimed shard; with `ahead`, in a thread, one shard ahead of the current one."""
    return (threads.ahead if ahead else map)(lambda claim: (claim, read(claim.shard)), claims)


@contextlib.contextmanager
def finish_batch_on_sigterm() -> Iterator[Callable[[], None]]:
    """Stop between two batches on SIGTERM: yield a function that raises `Terminated` once the signal has arrived.

    Shards that are being written are finished first.
    """
    requested = threading.Event()

    def check() -> None:
        if requested.is_set():
            raise Terminated

    with on_sigterm(requested.set):
        yield check
