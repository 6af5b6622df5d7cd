"""The state of a client between the rounds it takes part in, on its node's disk: control variates, last model, drift.

    .pipeline/federation/<run key>/client-0003/round-00012.safetensors     the state after training in round 12

With every request the server names the last round whose update of this client it aggregated, and the node continues
from that round's state. A reply that never arrived therefore leaves no trace, whichever side failed, and a server that
returned to its checkpoint finds the states of that time. Older states are removed then. States never leave the node;
they are removed when the run is finished.
"""

import logging
from pathlib import Path

from pipeline.io.resumable import ResumableStore
from stages.train_fl.methods import ClientState

log = logging.getLogger(__name__)


class States:
    """The states of one client in one run."""

    def __init__(self, state_dir: Path, run_key: str, client_id: int) -> None:
        """Use a folder under the node's `state_dir`."""
        self._store = ResumableStore(state_dir / "federation" / run_key / f"client-{client_id:04d}")

    def load(self, number: int, device: str) -> ClientState | None:
        """Return the state after round `number`; None for round 0 and, with a warning, if it is missing or damaged.

        If the operating system refuses to read it (SystemRefusal), the state is kept.
        """
        if number == 0:
            return None
        if not (found := self._store.load(_name(number), device)):
            log.warning("%s has no usable state of round %d. Starting without one.", self._store.folder, number)
            return None
        self._store.discard(name for name in self._store.names() if name < _name(number))
        return found[0]

    def save(self, number: int, state: ClientState) -> None:
        """Save the state after round `number`, unless the method has none."""
        if state:
            self._store.save(_name(number), state)

    def remove(self) -> None:
        """Remove all states, because the run is finished."""
        self._store.remove()


def _name(number: int) -> str:
    return f"round-{number:05d}"
