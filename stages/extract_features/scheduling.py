"""Who computes which shard, on one machine or many, and how work is stopped without losing any.

`accelerate launch -m pipeline extract-features` (or torchrun) starts a process per GPU and tells each its rank; every
process begins with the shards of its rank and then helps with what is left. Batch queues instead give each job a
`--shard-range`. No process talks to another: a shard is taken by its lock, which the system lets go if its holder
dies, and given by its file. What a shard holds does not depend on who computes it.
"""

import contextlib
import logging
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from pipeline.errors import PipelineError
from pipeline.feature_store import FeatureSetWriter

log = logging.getLogger(__name__)
T = TypeVar("T")

TERMINATED = 128 + signal.SIGTERM


class Claim(NamedTuple):
    """A missing shard that this process holds; closing `held` lets it go."""

    shard: int
    held: contextlib.ExitStack


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are, as accelerate and torchrun tell it; (0, 1) when run alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def order_of_shards(num_shards: int, shard_range: str | None, rank: int, world_size: int) -> list[int]:
    """The shards to see to, those of this rank first.

    Args:
        num_shards: of the whole set.
        shard_range: "A:B" for shards A to B - 1, or None for all.
        rank: of this process, from 0.
        world_size: number of processes.

    Raises:
        PipelineError: the range is not one.
    """
    shards = range(num_shards)
    if shard_range is not None:
        parts = re.fullmatch(r"(\d+):(\d+)", shard_range)
        if not parts or not int(parts[1]) < int(parts[2]) <= num_shards:
            raise PipelineError(f"--shard-range {shard_range}: must be A:B with 0 <= A < B <= {num_shards} shards")
        shards = shards[int(parts[1]) : int(parts[2])]
    return sorted(shards, key=lambda shard: ((shard - rank) % world_size != 0, shard))


def claim_missing(
    writer: FeatureSetWriter, shards: list[int], wait: bool, check: Callable[[], None]
) -> Iterator[Claim]:
    """Takes the missing shards one by one; those that others hold are passed over, or waited for."""
    for shard in shards:
        if writer.has_shard(shard):
            continue
        held = contextlib.ExitStack()
        if held.enter_context(writer.lock(f"shard-{shard:05d}", wait, check)) and not writer.has_shard(shard):
            yield Claim(shard, held)
        else:
            held.close()


def prepare(claims: Iterator[Claim], read: Callable[[int], T], ahead: bool) -> Iterator[tuple[Claim, T]]:
    """Calls `read` for each claimed shard; `ahead`: in a thread, one shard ahead of the one being worked on."""
    if not ahead:
        yield from ((claim, read(claim.shard)) for claim in claims)
        return
    pending: deque[tuple[Claim, Future[T]]] = deque()
    with ThreadPoolExecutor(1, "prepare") as pool:
        for claim in claims:
            pending.append((claim, pool.submit(read, claim.shard)))
            if len(pending) > 1:
                earlier, prepared = pending.popleft()
                yield earlier, prepared.result()
        for earlier, prepared in pending:
            yield earlier, prepared.result()


@contextlib.contextmanager
def finish_batch_on_sigterm() -> Iterator[Callable[[], None]]:
    """Turns SIGTERM into an end between two batches: gives a function that then raises SystemExit(143).

    Shards that are being written are finished first. A second SIGTERM ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked = threading.Event()
    previous = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def check() -> None:
        if asked.is_set():
            raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, ask)
    try:
        yield check
    except SystemExit:
        log.warning("stopped by SIGTERM: finished shards are kept, the same command continues from there")
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
