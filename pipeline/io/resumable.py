"""A store of finished units of work, so that an interrupted process resumes instead of starting over.

A unit is named tensors and JSON metadata in one safetensors file, with a checksum over both. It is written atomically
and checked when it is loaded; a damaged unit counts as missing, with a warning, and is computed again.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.io import atomic
from pipeline.io.system_errors import entries, reading, unwritten

log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_STALE_SECONDS = 7 * 24 * 3600
_SYNCS = 8  # at once: a file system writes the changes of many files together, in an eighth of the time for 70


class ResumableStore:
    """Units of work in one folder, by name. Key the folder by everything that determines their content."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which is created by the first `save`."""
        self.folder = folder

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: Any = None, sync: bool = True) -> None:
        """Write a unit, replacing an earlier one of that name; tensors may share memory and be on any device.

        The name is the file's, without its suffix; `meta` holds JSON values to keep with the tensors. Without `sync`,
        it survives a power cut only after the method `sync`, which waits once for many units.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # Own copies, because the format refuses tensors that share memory.
        contiguous = torch.contiguous_format
        own = {key: tensor.detach().cpu().clone(memory_format=contiguous) for key, tensor in tensors.items()}
        content = json.dumps({"order": list(own), "meta": meta})  # the format does not keep the order
        with atomic.replace_file(self._file(name), sync) as temporary:
            save_file(own, temporary, metadata={"content": content, "sha256": _sha256(content, own)})

    def load(self, name: str, device: str = "cpu") -> tuple[dict[str, Tensor], Any] | None:
        """Return the tensors of a unit, on `device`, and its metadata; None if it is missing or damaged.

        Raise SystemRefusal, and keep the file, if the operating system refused to read it.
        """
        file = self._file(name)
        try:
            with reading(file):
                file.open("rb").close()  # safetensors reports any file that it cannot open as missing
                with safe_open(file, "pt") as opened:
                    metadata = opened.metadata()
                    content = json.loads(metadata["content"])
                    tensors = {key: opened.get_tensor(key) for key in content["order"]}
            if _sha256(metadata["content"], tensors) != metadata["sha256"]:
                raise ValueError("its checksum does not match")
            return {key: tensor.to(device) for key, tensor in tensors.items()}, content["meta"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("%s is damaged (%s). Computing it again.", file, error)
            return None

    def sync(self, names: Iterable[str]) -> None:
        """Wait until units that were saved without `sync` are on the disk; PipelineError if they cannot be written."""
        if not (files := [self._file(name) for name in names]):
            return
        try:
            with ThreadPoolExecutor(_SYNCS) as pool:
                list(pool.map(atomic.sync_to_disk, files))
            atomic.sync_to_disk(self.folder)
        except OSError as error:
            raise unwritten(self.folder, error) from None

    def names(self) -> list[str]:
        """Return the names of all units, ascending, damaged ones included."""
        return [file.stem for file in entries(self.folder) if file.suffix == _SUFFIX]

    def discard(self, names: Iterable[str]) -> None:
        """Remove units, if they exist."""
        for name in names:
            self._file(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder: its work is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_stale(self) -> None:
        """Remove the week-old folders whose name differs from this one's only in its last 16 digits, the key.

        Newer ones may belong to the same work in a copy of the project, for example a DVC experiment.
        """
        for other in self.folder.parent.glob(f"{self.folder.name[:-16]}{'[0-9a-f]' * 16}"):
            with contextlib.suppress(OSError):
                if time.time() - other.stat().st_mtime > _STALE_SECONDS:
                    atomic.remove(other)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"


def _sha256(content: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(content.encode())
    for key, tensor in tensors.items():
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
