"""What HDF5 may hold and we never read: a file may come from anywhere.

The format knows datasets that stand in other files (external links and storage, virtual datasets), that take a
thousand times their file's room (never written, or compressed), and elements that are pointers (text of variable
length, references), which, mapped into memory, would be followed.
"""

from pathlib import Path
from typing import Any

import h5py


def check_plain(dataset: Any, file: Path) -> None:
    """Checks that a dataset is numbers, contiguous, all in this file.

    Args:
        dataset: what h5py found under the dataset's name.
        file: where it must stand.

    Raises:
        ValueError: it is not; says why.
    """
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise ValueError("a dataset is missing")
    if dataset.dtype.kind not in "iuf":
        raise ValueError(f"dataset {dataset.name} holds {dataset.dtype}, not numbers")
    offset = dataset.id.get_offset()
    if offset is None or dataset.external or dataset.is_virtual:
        raise ValueError(f"dataset {dataset.name} is not contiguous")
    if dataset.file.filename != str(file) or offset + dataset.nbytes > file.stat().st_size:
        raise ValueError(f"dataset {dataset.name} stands outside the file")
