"""The states of clients between the rounds they take part in: control variates, drifts, previous models.

    <folder>/client-00003-round-00012.safetensors     the state of client 3 after its training in round 12

A state belongs to the round after which it was saved, and continuing a run needs that round: the checkpoint has it for
every client of a local run, Flower's server in its request to a node. A state that was saved and then lost its round,
by a kill or a reply that never arrived, is therefore never used.

Recent states stay in memory, up to a limit. A state is written when it leaves memory, or for a checkpoint if it changed
since the last one; so memory is that of the participants and of the limit, and the disk holds at most two states of a
client that took part, none of others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.io.resumable import ResumableStore
from stages.train_fl.methods import ClientState

_HOST_BYTES = 2**28
_DEVICE_SHARE = 4


def memory_limit(device: str) -> int:
    """Return the bytes of states to hold in memory: 256 MiB; on a GPU a quarter of its free memory."""
    return torch.cuda.mem_get_info(device)[0] // _DEVICE_SHARE if device.startswith("cuda") else _HOST_BYTES


@dataclass
class _Held:
    number: int
    state: ClientState
    is_written: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.values())


class ClientStates:
    """The states of a run's clients, by client and round."""

    def __init__(self, folder: Path | None = None, memory: int = _HOST_BYTES, device: str = "cpu") -> None:
        """Use a folder, which the first write creates, for the states beyond `memory` bytes and for checkpoints.

        Without a folder, all states stay in memory. `device` is that of loaded states.
        """
        self._store = ResumableStore(folder) if folder else None
        self._memory, self._device = memory, device
        self._held: dict[int, _Held] = {}  # by client; the first ones were saved the longest ago
        self._num_bytes = 0  # of those held
        self._written: dict[int, int] = {}  # client -> round of the file that was written since the last `keep`

    def load(self, client: int, number: int) -> ClientState | None:
        """Return a client's state after round `number`; None for round 0, and if it is missing or damaged.

        If the operating system refuses to read it (SystemRefusal), the file is kept.
        """
        if (held := self._held.get(client)) and held.number == number:
            return held.state
        found = self._store.load(_name(client, number), self._device) if self._store and number else None
        return found[0] if found else None

    def save(self, client: int, number: int, state: ClientState) -> None:
        """Keep a client's state after round `number`, in place of what memory holds; nothing if it is empty."""
        self._drop(client)
        if not state:
            return
        self._held[client] = _Held(number, state)
        self._num_bytes += self._held[client].num_bytes
        while self._store and self._num_bytes > self._memory:
            oldest = next(iter(self._held))
            self._write(self._store, oldest)
            self._drop(oldest)

    def sync(self) -> None:
        """Write the states that are in memory alone, and wait until all that were written are on the disk."""
        if self._store:
            for client in self._held:
                self._write(self._store, client)
            self._store.sync(_name(*item) for item in self._written.items())

    def keep(self, rounds: Mapping[int, int]) -> None:
        """Remove the files of all states but those after `rounds` (client -> round)."""
        if self._store:
            named = {_name(*item) for item in rounds.items()}
            self._store.discard(name for name in self._store.names() if name not in named)
        self._written.clear()

    def has_all(self, rounds: Mapping[int, int]) -> bool:
        """Read the files of the states after `rounds` (client -> round), and return whether all are undamaged."""
        return all(self._store and self._store.load(_name(*item)) for item in rounds.items())

    def remove(self) -> None:
        """Remove the folder, because the run is finished."""
        if self._store:
            self._store.remove()

    def _write(self, store: ResumableStore, client: int) -> None:
        held = self._held[client]
        if held.is_written:
            return
        store.save(_name(client, held.number), held.state, sync=False)  # `sync` waits for all together
        held.is_written = True
        if (earlier := self._written.get(client)) not in (None, held.number):
            store.discard([_name(client, earlier)])  # no checkpoint names it
        self._written[client] = held.number

    def _drop(self, client: int) -> None:
        if held := self._held.pop(client, None):
            self._num_bytes -= held.num_bytes


def _name(client: int, number: int) -> str:
    return f"client-{client:05d}-round-{number:05d}"
