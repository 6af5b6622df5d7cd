"""The checkpoint of a run: all server and client state between two rounds, and the rows recorded so far.

The latest round is one unit of a `ResumableStore`, which replaces the round before it, so a kill at any moment leaves
one of the two complete. Optimisers are created in each round and random draws are keyed by round, so nothing else is
needed to resume with identical results.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.io.resumable import ResumableStore
from stages.train_fl.methods import ServerState
from stages.train_fl.rounds import Progress


class Checkpoint:
    """The checkpoint of one run, in a folder that is named after everything that determines the run."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which the first `save` creates; its name is the run's and a key of 16 hexadecimal digits."""
        self._store = ResumableStore(folder)

    def save(self, progress: Progress, records: dict[str, Any]) -> None:
        """Write a checkpoint, with the rows so far as JSON, then remove the one before it, which is kept on failure."""
        name = f"round-{progress.number:05d}"
        meta = {
            "round": progress.number,
            "num_clients": len(progress.clients),
            "state_rounds": progress.state_rounds,
            "records": records,
        }
        self._store.save(name, _flatten(progress), meta)
        self._store.discard(other for other in self._store.names() if other != name)

    def load(self, device: str) -> tuple[Progress, dict[str, Any]] | None:
        """Return the progress, its tensors on `device`, and the records; None if there is no usable checkpoint.

        If the operating system refuses to read it (SystemRefusal), the checkpoint is kept.
        """
        for name in reversed(self._store.names()):
            if found := self._store.load(name, device):
                return _unflatten(*found), found[1]["records"]
        return None

    def remove(self) -> None:
        """Remove the checkpoint, because the run is finished, and those of its other keys that are a week old."""
        self._store.remove()
        self._store.remove_stale()


def _flatten(progress: Progress) -> dict[str, Tensor]:
    """Return all tensors, named server/<field>/<name> or client/<id>/<name>."""
    named = {
        f"server/{field.name}/{name}": tensor
        for field in fields(ServerState)
        for name, tensor in getattr(progress.server, field.name).items()
    }
    for client, state in enumerate(progress.clients):
        named |= {f"client/{client}/{name}": tensor for name, tensor in state.items()}
    return named


def _unflatten(tensors: dict[str, Tensor], meta: dict[str, Any]) -> Progress:
    server: dict[str, dict[str, Tensor]] = {field.name: {} for field in fields(ServerState)}
    clients: list[dict[str, Tensor]] = [{} for _ in range(meta["num_clients"])]
    for path, tensor in tensors.items():
        owner, part, name = path.split("/", 2)
        (server[part] if owner == "server" else clients[int(part)])[name] = tensor
    return Progress(meta["round"], ServerState(**server), clients, meta["state_rounds"])
