"""Tensors in files without a name: they occupy the disk instead of memory.

The system keeps the pages that are in use in memory, as those of any file, and takes them back when memory is short. A
file without a name is in no folder and disappears with its last tensor, or with the process, however that ends. So
there is nothing to clean up.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.io import mapped
from pipeline.io.system_errors import error_number, in_words, remedy

_ALIGNMENT = 64  # bytes, of every tensor's first element


def on_disk(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return equal tensors, contiguous and on the CPU, which are memory maps of a new file.

    Args:
        tensors: The tensors, of any type and on any device.
        folder: A folder on the disk to use. It is created if it does not exist.

    Raises:
        PipelineError: The disk is full, or the folder cannot be written.
    """
    if not any(value.nbytes for value in tensors.values()):
        return dict(tensors)  # an empty file cannot be mapped
    places = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            for name, value in tensors.items():
                stream.write(bytes(-stream.tell() % _ALIGNMENT))
                places[name] = stream.tell()
                stream.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            stream.flush()
            content = torch.from_numpy(mapped.whole(stream, writable=True))
    except OSError as error:
        advice = remedy(error_number(error) or 0)
        raise PipelineError(f"{folder} cannot be written ({in_words(error)}). {advice}.") from None
    return {
        name: content[places[name] : places[name] + value.nbytes].view(value.dtype).reshape(value.shape)
        for name, value in tensors.items()
    }
