"""Hugging Face data sets: a folder of `datasets.save_to_disk`, or the Parquet files of one on the hub at a commit."""

import json
import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.data.images import Source
from pipeline.data.split_folders import SPLIT_OF_WORD
from pipeline.errors import DataError
from pipeline.hub import address
from pipeline.hub.kinds import DATASET
from pipeline.io import system_errors
from pipeline.settings.params import PrepareData
from pipeline.text import first_few, printable
from stages.prepare_data import shard_files, tables
from stages.prepare_data.shards import Shards

log = logging.getLogger(__name__)

_STATE, _DICT = "state.json", "dataset_dict.json"


def hf_dataset(root: Path, params: PrepareData) -> Source:
    """Read what `save_to_disk` of a Dataset or DatasetDict wrote; see `tables`.

    Splits of a DatasetDict are known by their names, and other ones left out. Of a single Dataset, one image
    in five becomes the test split.

    Raises:
        DataError: `root` is not such a folder, or see `tables.parquet`.
    """
    tables.require_pyarrow()
    if system_errors.status(root) is None:
        raise DataError(
            f"{root} does not exist. Set prepare_data.path to a folder that save_to_disk wrote, or to the address of a "
            "data set on the hub, organisation/name@COMMIT."
        )
    if system_errors.status(root / _DICT) is not None:
        splits = _by_name(root, _read_json(root / _DICT).get("splits"))
    elif system_errors.status(root / _STATE) is not None:
        splits = {"all": _files(root, "")}
    else:
        raise DataError(
            f"{root} has neither {_STATE} nor {_DICT}, so save_to_disk did not write it. Set prepare_data.path to a "
            "folder that has, or prepare_data.source: parquet for a folder of Parquet files."
        )
    return tables.read(Shards(str(root), root, splits), params)


def on_hub(written: str, listings: Path, params: PrepareData) -> Source:
    """Download the Parquet files of the splits that are used, check them against the hub's hashes, and read them.

    Args:
        written: organisation/name@commit, or the address of the page, with a folder or a pattern of files after it.
        listings: Folder for the lists of files, for runs without a network.
        params: The settings.

    Raises:
        ConfigError: `written` is not an address on the hub, or lacks a commit; the message says the present one.
        DataError: The files cannot be had, or see `tables.parquet`.
    """
    tables.require_pyarrow()
    hub_id, commit, folder = address.pinned(DATASET, written)
    from pipeline.hub.repository import Repository

    repository = Repository(DATASET, hub_id, commit, listings)
    names = sorted(name for name in repository.sizes if name.endswith(".parquet") and _is_wanted(name, folder))
    if not names:
        where = f" in {folder}" if folder else ""
        others = first_few(sorted({PurePosixPath(name).suffix for name in repository.sizes} - {"", ".md"})) or "none"
        raise DataError(
            f"{repository.title} has no Parquet files{where} (others: {printable(others)}). Correct the path, or "
            "use the commit of the branch refs/convert/parquet, if the hub has made one."
        )
    title = f"{repository.title}{f', {folder}' if folder else ''}"
    splits = shard_files.by_split(title, names, one_set=not shard_files.is_pattern(folder))

    def fetch(files: Sequence[str]) -> None:
        repository.fetch(files)

    return tables.read(Shards(title, repository.folder, splits, hub_id, commit, fetch), params)


def _is_wanted(name: str, folder: str) -> bool:
    if not folder:
        return True
    return any(name.startswith(f"{one}/") or fnmatchcase(name, one) for one in shard_files.expanded(folder))


def _by_name(root: Path, names: Any) -> dict[str, list[str]]:
    """Return the files of the splits of a DatasetDict."""
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_plain(name) for name in names):
        raise DataError(f"{root / _DICT} does not list the names of splits. Save the data set again.")
    known = {name: SPLIT_OF_WORD[name.casefold()] for name in names if name.casefold() in SPLIT_OF_WORD}
    if len(names) == 1:
        return {"all": _files(root, names[0])}
    if len(set(known.values())) < len(known) or "train" not in known.values():
        found = first_few([printable(name) for name in names]) or "none"
        raise DataError(f"{root} needs one split for training, and one to test (splits: {found}). Rename them.")
    if others := sorted(set(names) - set(known)):
        log.info("%s: splits left out: %s", root, printable(first_few(others)))
    return {split: _files(root, name) for name, split in known.items()}


def _files(root: Path, folder: str) -> list[str]:
    """Return the Arrow files of a saved Dataset, relative to the root."""
    state = root / folder / _STATE
    content = _read_json(state)
    listed = content.get("_data_files")
    names = [str(one.get("filename")) for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    if not names or not all(_is_plain(name) for name in names):
        raise DataError(f"{state} lists no files of a data set. Save the data set again.")
    if content.get("_indices_data_files"):
        raise DataError(f"{state} is of an old version of datasets, with a file of indices. Save the data set again.")
    files = [f"{folder}/{name}" if folder else name for name in names]
    for file in files:
        if system_errors.status(root / file) is None:
            raise DataError(f"{root / file} is missing. Get the complete data set, or save it again.")
    return files


def _is_plain(name: str) -> bool:
    """Return whether a name is of a file or folder in the same folder."""
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name and "\0" not in name


def _read_json(file: Path) -> dict[str, Any]:
    try:
        with system_errors.reading(file):
            content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read ({printable(str(error))}). Save the data set again.") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a JSON object. Save the data set again.")
    return content
