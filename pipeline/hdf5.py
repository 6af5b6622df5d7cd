"""What HDF5 may hold and we never read: a file may come from anywhere.

The format knows datasets that stand in other files (external links and storage, virtual datasets), that take a
thousand times their file's room (never written, or compressed), and elements that are pointers (text of variable
length, references), which, mapped into memory, would be followed.
"""

from pathlib import Path

import h5py


def plain_dataset(h5: h5py.File, name: str, file: Path) -> h5py.Dataset:
    """A dataset of numbers, contiguous, all in this file; links are refused before they are followed.

    Args:
        h5: the open file.
        name: of the dataset, "/" between groups.
        file: where its bytes must stand.

    Raises:
        KeyError: there is none.
        ValueError: it is something else; says what.
    """
    parts = name.split("/")
    for stop in range(1, len(parts) + 1):
        path = "/".join(parts[:stop])
        link = h5.get(path, getlink=True)
        if link is None:
            raise KeyError(f"there is no {path}")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{path} is a link to somewhere else")
    dataset = h5[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise ValueError(f"{name} is not a dataset")
    if dataset.dtype.kind not in "iuf":
        raise ValueError(f"dataset {name} holds {dataset.dtype}, not numbers")
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"the bytes of {name} stand in another file")
    offset = dataset.id.get_offset()
    if offset is None:
        raise ValueError(f"dataset {name} is not contiguous")
    if offset + dataset.nbytes > file.stat().st_size:
        raise ValueError(f"dataset {name} goes beyond the end of the file")
    return dataset
