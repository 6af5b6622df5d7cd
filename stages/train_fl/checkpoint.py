"""Checkpoints of a run: all server and client state between two rounds, and the rows written so far.

    round-00010.safetensors   every tensor, named server/<field>/<name> or client/<id>/<name>
    checkpoint.json           the round, the number of clients, the tensors' file, SHA-256 and order, the rows

Tensors are written first and the JSON, which names them, is replaced last: a kill at any moment leaves the checkpoint
before or the one after, whole. Optimisers start anew each round and random draws are keyed by round, so nothing else
is needed to go on to the same bytes. A folder is keyed by all that decides the run. No pickle.
"""

import json
import logging
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import provenance
from pipeline.io import atomic
from pipeline.io.system_errors import reading, unwritten
from stages.train_fl.methods import ServerState
from stages.train_fl.rounds import Progress

log = logging.getLogger(__name__)


class Checkpoint:
    """The checkpoint of one run."""

    def __init__(self, folder: Path) -> None:
        """Kept in `folder`, which is made when first needed."""
        self._folder = folder
        self._index = folder / "checkpoint.json"

    def save(self, progress: Progress, records: dict[str, Any]) -> None:
        """Writes a checkpoint, then drops the one before.

        Args:
            progress: the federation between two rounds.
            records: what else the run needs to go on, as JSON.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"round-{progress.number:05d}.safetensors"
        tensors = _flatten(progress)
        save_tensors(file, tensors)
        content = {
            "round": progress.number,
            "num_clients": len(progress.clients),
            "file": file.name,
            "sha256": provenance.file_sha256(file),
            "tensors": list(tensors),
            "records": records,
        }
        atomic.write_json(self._index, content)
        atomic.sync_to_disk(self._index)
        for old in self._folder.glob("round-*"):
            if old != file:
                old.unlink(missing_ok=True)

    def load(self, device: str) -> tuple[Progress, dict[str, Any]] | None:
        """The progress, its tensors on `device`, and the records; None if there is none that is whole.

        Raises:
            SystemRefusal: the operating system did not let it be read; it is kept.
        """
        try:
            with reading(self._index):
                content = json.loads(self._index.read_text(encoding="utf-8"))
            file = self._folder / content["file"]
            if provenance.file_sha256(file) != content["sha256"]:
                raise ValueError(f"{file.name} is not what was written")
            loaded = load_tensors(file, device)
            tensors = {name: loaded[name] for name in content["tensors"]}  # the format does not keep their order
            return _unflatten(tensors, content["round"], content["num_clients"]), content["records"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("%s cannot be used (%s): starting from the first round", self._index, error)
            return None

    def remove(self) -> None:
        """Drops the checkpoint: the run is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)


def load_tensors(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on `device`.

    Raises:
        SystemRefusal: the operating system did not let it be read.
        OSError: there is no such file.
        SafetensorError: it is damaged.
    """
    with reading(file):
        file.open("rb").close()  # safetensors takes every file that it cannot open for a missing one
        return load_file(file, device=device)


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        PipelineError: it cannot be written.
    """
    temporary = file.with_name(file.name + ".tmp")
    try:
        save_file(tensors, temporary)
        atomic.sync_to_disk(temporary)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise unwritten(file, error) from None


def _flatten(progress: Progress) -> dict[str, Tensor]:
    """Own copies on the CPU: states may share tensors, which the format refuses."""
    named = {
        f"server/{field.name}/{name}": tensor
        for field in fields(ServerState)
        for name, tensor in getattr(progress.server, field.name).items()
    }
    for client, state in enumerate(progress.clients):
        named |= {f"client/{client}/{name}": tensor for name, tensor in state.items()}
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in named.items()}


def _unflatten(tensors: dict[str, Tensor], number: int, num_clients: int) -> Progress:
    server: dict[str, dict[str, Tensor]] = {field.name: {} for field in fields(ServerState)}
    clients: list[dict[str, Tensor]] = [{} for _ in range(num_clients)]
    for path, tensor in tensors.items():
        owner, part, name = path.split("/", 2)
        (server[part] if owner == "server" else clients[int(part)])[name] = tensor
    return Progress(number, ServerState(**server), clients)
