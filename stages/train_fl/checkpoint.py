"""The checkpoint of a run: the state between two rounds, and the rows recorded so far.

    round-00010.safetensors                      the server's state, the rows, and the round of each client's state
    states/client-00003-round-00007.safetensors  a client's state, in a local run (`client_states`)

The latest round is one unit of a `ResumableStore`. The states that it names are on the disk before it is written, and
those that the round before it named, with that round itself, are removed after, so a kill at any moment leaves one of
the two complete. Optimisers are created in each round and random draws are keyed by round, so nothing else is needed to
resume with identical results.
"""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.io.resumable import ResumableStore
from stages.train_fl.client_states import ClientStates
from stages.train_fl.methods import ServerState
from stages.train_fl.rounds import Progress

log = logging.getLogger(__name__)


class Checkpoint:
    """The checkpoint of one run, in a folder that is named after everything that determines the run."""

    def __init__(self, folder: Path, states: ClientStates | None = None) -> None:
        """Use `folder`, which the first `save` creates; its name is the run's and a key of 16 hexadecimal digits.

        `states` are the clients', in a folder within it; None if they are kept on other machines.
        """
        self._store, self.states = ResumableStore(folder), states

    def save(self, progress: Progress, records: dict[str, Any]) -> None:
        """Write a checkpoint, with the rows so far as JSON, then remove the one before it, which is kept on failure."""
        if self.states:
            self.states.sync()
        name = f"round-{progress.number:05d}"
        meta = {"round": progress.number, "state_rounds": progress.state_rounds, "records": records}
        self._store.save(name, _flatten(progress.server), meta)
        self._keep(name, progress)

    def load(self, device: str) -> tuple[Progress, dict[str, Any]] | None:
        """Return the progress, its tensors on `device`, and the records; None if there is no usable checkpoint.

        All clients' states that it names are read once, so that a damaged one is found now. If the operating system
        refuses to read a file (SystemRefusal), the checkpoint is kept.
        """
        for name in reversed(self._store.names()):
            if not (found := self._store.load(name, device)):
                continue
            progress = _unflatten(*found)
            if self.states is None or self.states.has_all(progress.state_rounds):
                self._keep(name, progress)
                return progress, found[1]["records"]
            log.warning(
                "%s lacks clients' states. The run starts over.",
                self._store.folder / name,
            )
        return None

    def remove(self) -> None:
        """Remove the checkpoint, because the run is finished, and those of its other keys that are a week old."""
        self._store.remove()
        self._store.remove_stale()

    def _keep(self, name: str, progress: Progress) -> None:
        """Remove every other checkpoint, then the states that this one does not name."""
        self._store.discard(other for other in self._store.names() if other != name)
        if self.states:
            self.states.keep(progress.state_rounds)


def _flatten(server: ServerState) -> dict[str, Tensor]:
    """Return all tensors, named <field>/<name>."""
    return {
        f"{field.name}/{name}": tensor
        for field in fields(ServerState)
        for name, tensor in getattr(server, field.name).items()
    }


def _unflatten(tensors: dict[str, Tensor], meta: dict[str, Any]) -> Progress:
    server: dict[str, dict[str, Tensor]] = {field.name: {} for field in fields(ServerState)}
    for path, tensor in tensors.items():
        part, name = path.split("/", 1)
        server[part][name] = tensor
    state_rounds = {int(client): number for client, number in meta["state_rounds"].items()}
    return Progress(meta["round"], ServerState(**server), state_rounds)
