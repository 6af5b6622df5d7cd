"""What a node keeps between the rounds it takes part in, on its own disk: control variates, its last model, drifts.

    .pipeline/federation/<key>/client-0003/round-00012.safetensors     the state after its training in round 12

The server says with every order which round's update of this client it added up last, and the node goes on from that
round's state: an answer that never arrived leaves no trace, whether the node, the server or the line between them
failed, and a server that went back to its checkpoint finds the states of that time. Older states are dropped then.
States never leave the node; they are dropped when the run is finished.
"""

import logging
import shutil
from pathlib import Path

from safetensors import SafetensorError

from stages.train_fl.checkpoint import load_tensors, save_tensors
from stages.train_fl.methods import ClientState

log = logging.getLogger(__name__)


class States:
    """The states of one client in one run."""

    def __init__(self, state_dir: Path, key: str, client_id: int) -> None:
        """Under the node's `state_dir`, for the run of this key."""
        self._folder = state_dir / "federation" / key / f"client-{client_id:04d}"

    def load(self, number: int, device: str) -> ClientState | None:
        """The state after round `number`, on `device`; None for round 0 and, with a warning, if it is lost or damaged.

        Raises:
            SystemRefusal: the operating system did not let it be read; it is kept.
        """
        if number == 0:
            return None
        file = self._file(number)
        try:
            tensors = load_tensors(file, device)
        except (OSError, SafetensorError) as error:
            log.warning("%s, this client's state, cannot be read (%s): it begins anew", file, error)
            return None
        for older in self._folder.glob("round-*.safetensors"):
            if older.name < file.name:
                older.unlink(missing_ok=True)
        return tensors

    def save(self, number: int, state: ClientState) -> None:
        """Keeps the state after round `number`; nothing for methods that keep nothing.

        Raises:
            PipelineError: it cannot be written.
        """
        if state:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self._file(number), {name: value.cpu().contiguous() for name, value in state.items()})

    def remove(self) -> None:
        """Drops all states: the run is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"round-{number:05d}.safetensors"
