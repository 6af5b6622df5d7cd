"""Tables of images in Hugging Face's form: Parquet files, and the Arrow streams of `datasets.save_to_disk`.

An image is a column struct<bytes, path>, or of bytes; only embedded bytes are read. The label is a number or a name.
The schema's metadata "huggingface" says which columns are images and class labels, and has the class names; without
it, columns are found by type and name. Rows are read in order, a few at a time, and groups of rows without a selected
image are skipped, so memory does not depend on the size of a file or of its groups.

Both formats are read by pyarrow, an optional dependency. Arrow files may come from anyone and pyarrow trusts them, so
their arrays are validated before use.
"""

import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.data.file_names import canonical
from pipeline.data.images import Source
from pipeline.errors import DataError
from pipeline.io import system_errors
from pipeline.settings.params import PrepareData
from pipeline.text import first_few, printable
from stages.prepare_data import shard_files, shards
from stages.prepare_data.labels import Labels, read_names
from stages.prepare_data.shards import EncodedImages, Listing, Shards

if TYPE_CHECKING:
    import pyarrow

_ROWS_PER_STEP = 64
_LABELS_PER_STEP = 65_536
_BUFFER = 2**20
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_GET_AGAIN = "Get the complete file"
_NO_BYTES = "has no bytes in the table (it is null, or in a file elsewhere)"


class Table(Protocol):
    """One file, open; rows come in groups, each of which can be read without the others."""

    schema: "pyarrow.Schema"
    group_rows: list[int]

    def column(self, name: str) -> Iterator["pyarrow.Array"]:
        """Yield a column of all rows in parts."""

    def images(self, group: int, name: str) -> Iterator["pyarrow.Array"]:
        """Yield the bytes of an image column of one group in parts."""

    def close(self) -> None:
        """Close the file."""


def parquet(root: Path, params: PrepareData) -> Source:
    """Read a folder or a pattern of Parquet files; see the module's description, and `shard_files` for the splits.

    Raises:
        DataError: pyarrow is missing, there are no files, one is damaged or lacks a column, columns are ambiguous, or
            a row has no label.
    """
    require_pyarrow()
    folder, names = shard_files.find(root, (".parquet",))
    is_folder = system_errors.status(root) is not None
    splits = shard_files.by_split(str(root), names, one_set=is_folder)
    return read(Shards(str(root), folder, splits), params)


def read(found: Shards, params: PrepareData) -> Source:
    """Read tables whose files and splits are known; see `parquet`."""
    names = read_names([found.root, found.root.parent])
    return shards.read(found, lambda split, files: _list(found, files, params), names, params.seed)


def require_pyarrow() -> None:
    """Raise DataError if pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise DataError("Parquet and Arrow files need the package pyarrow. Run `pip install pyarrow`.") from None


class TableImages(EncodedImages):
    """The images of some tables, by their rows, which count on from file to file."""

    def __init__(
        self, root: Path, files: Sequence[str], image_size: int, columns: Sequence[str], rows: Sequence[int]
    ) -> None:
        """`columns` are the image columns of the files, and `rows` their numbers of rows."""
        super().__init__(root, files, image_size)
        self._columns = columns
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    def items(self, positions: np.ndarray) -> Generator[bytes | str]:
        """Yield the bytes of the image files, or why there are none."""
        for number, (start, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            first, last = np.searchsorted(positions, [start, end])
            if first < last:
                wanted = positions[first:last] - start
                yield from _images(self.root / self.files[number], self._columns[number], wanted)

    def identity(self) -> str:
        """Add the image columns to the files."""
        return f"{super().identity()}\n{list(self._columns)!r}"

    def name(self, position: int) -> str:
        """Return the file's name and the row."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return f"{canonical(self.files[number])}, row {position - self._starts[number]}"


def _images(file: Path, column: str, rows: np.ndarray) -> Iterator[bytes | str]:
    """Yield the images of these rows of a file, ascending."""
    with _Opened(file) as table:
        start = 0
        for group, count in enumerate(table.group_rows):
            wanted = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + count)] - start
            if len(wanted):
                yield from _chosen(table.images(group, column), wanted)
            start += count


def _chosen(parts: Iterator["pyarrow.Array"], rows: np.ndarray) -> Iterator[bytes | str]:
    """Yield these rows, ascending, of the parts of a column."""
    start = 0
    for part in parts:
        end = start + len(part)
        for row in rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)]:
            content = part[int(row - start)].as_py()
            yield _NO_BYTES if content is None else content
        start = end
        if start > rows[-1]:
            return


def _list(found: Shards, files: Sequence[str], params: PrepareData) -> Listing:
    """Read the labels of some tables."""
    labels = Labels(found.title)
    columns, rows = [], []
    names: list[str] | None = None
    for _, name in shards.tracked(files):
        file = found.root / name
        with _Opened(file) as table:
            image, label = _choose_columns(file, table.schema, params)
            in_file, features = 0, _features(table.schema)
            for part in table.column(label):
                _add_labels(labels, part, f"{canonical(name)}, row", in_file)
                in_file += len(part)
        class_names = features.get(label, {}).get("names")
        if isinstance(class_names, list) and all(isinstance(one, str) for one in class_names) and class_names:
            if names is not None and names != class_names:
                raise DataError(f"{file} has other class names than {files[0]}. Write both with the same ClassLabel.")
            names = class_names
        columns.append(image)
        rows.append(in_file)
    return Listing(TableImages(found.root, files, params.image_size, columns, rows), labels, {}, names)


def _add_labels(labels: Labels, column: "pyarrow.Array", where: str, start: int) -> None:
    for row, label in enumerate(column.to_pylist(), start):
        labels.add(label, f"{where} {row}")


def _choose_columns(file: Path, schema: "pyarrow.Schema", params: PrepareData) -> tuple[str, str]:
    """Return the names of the image column and of the label column."""
    import pyarrow as pa

    features = _features(schema)
    types = {field.name: field.type for field in schema}
    images = [name for name, kind in types.items() if _is_image(kind)]
    image = _one(file, "image", params.image_column, images, [
        [name for name in images if features.get(name, {}).get("_type") == "Image"],
        [name for name in images if pa.types.is_struct(types[name])],
        [name for name in images if name in ("image", "img")],
        images,
    ])  # fmt: skip
    labels = [name for name, kind in types.items() if pa.types.is_integer(kind) or _is_text(kind)]
    label = _one(file, "label", params.label_column, labels, [
        [name for name in labels if features.get(name, {}).get("_type") == "ClassLabel"],
        [name for name in labels if name == "label"],
        [name for name in labels if name in ("labels", "class", "target")],
    ])  # fmt: skip
    return image, label


def _one(file: Path, what: str, chosen: str | None, possible: list[str], guesses: list[list[str]]) -> str:
    """Return the chosen column, or the one of the first guess that has any."""
    setting = f"prepare_data.{what}_column"
    there = first_few([printable(name) for name in possible], 8)
    if not possible:
        wanted = "embedded images" if what == "image" else "names or whole numbers, which labels are"
        raise DataError(f"{file} has no column of {wanted}. Add one.")
    if chosen is not None:
        if chosen not in possible:
            raise DataError(f"{file} has no {what} column {chosen}. Set {setting} to one of: {there}.")
        return chosen
    found = next((names for names in guesses if names), [])
    if len(found) != 1:
        problem = (
            f"several {what} columns ({first_few(found)})" if found else f"no column that is known to be the {what}"
        )
        raise DataError(f"{file} has {printable(problem)}. Set {setting} to one of: {there}.")
    return found[0]


def _is_image(kind: "pyarrow.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: "pyarrow.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _has_dictionary(kind: "pyarrow.DataType") -> bool:
    import pyarrow as pa

    inner = (kind.field(number).type for number in range(kind.num_fields))
    return pa.types.is_dictionary(kind) or any(map(_has_dictionary, inner))


def _features(schema: "pyarrow.Schema") -> dict[str, dict[str, Any]]:
    """Return the description of the columns that Hugging Face's libraries keep in the metadata; {} without."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


class _Opened:
    """A context manager that opens a table and turns pyarrow's errors into one line about the file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> Table:
        try:
            is_parquet = self._file.name.lower().endswith(".parquet")
            self._table: Table = ParquetTable(self._file) if is_parquet else ArrowTable(self._file)
        except Exception as error:
            self._explain(error)
            raise
        return self._table

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._table.close()
        self._explain(error)

    def _explain(self, error: BaseException | None) -> None:
        import pyarrow as pa

        if isinstance(error, UnicodeDecodeError):
            raise DataError(
                f"{self._file} has labels or column names that are not UTF-8. Write them as UTF-8."
            ) from None
        if not isinstance(error, pa.ArrowException | OSError):
            return
        what = "Parquet" if self._file.name.lower().endswith(".parquet") else "Arrow"
        reason = printable(" ".join(str(error).split()))[:200]
        raise system_errors.refusal(error, self._file) or DataError(
            f"{self._file} is not a complete {what} file ({reason}). {_GET_AGAIN}."
        ) from None


class ParquetTable:
    """A Parquet file; its groups are row groups, which are decoded page by page."""

    def __init__(self, file: Path) -> None:
        """Open the file and read its footer."""
        from pyarrow import parquet

        with file.open("rb"):  # pyarrow's errors of the system have no number
            self._file = parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER)
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def column(self, name: str) -> Iterator["pyarrow.Array"]:
        """Yield a column in parts."""
        for batch in self._file.iter_batches(_LABELS_PER_STEP, columns=[name]):
            yield batch.column(0)

    def images(self, group: int, name: str) -> Iterator["pyarrow.Array"]:
        """Yield the bytes of an image column of one group in parts."""
        column = name if self.schema.field(name).type.num_fields == 0 else f"{name}.bytes"
        for batch in self._file.iter_batches(_ROWS_PER_STEP, row_groups=[group], columns=[column]):
            yield _bytes(batch.column(0))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ArrowTable:
    """An Arrow stream, as `datasets` writes it; its groups are record batches, which are found by their messages."""

    def __init__(self, file: Path) -> None:
        """Open the file and find its record batches, without reading them."""
        import pyarrow as pa

        with file.open("rb") as stream:
            stream.seek(-min(len(_END_OF_STREAM), stream.seek(0, 2)), 2)
            complete = stream.read() == _END_OF_STREAM
        if not complete:
            raise DataError(f"{file} is not a complete Arrow stream (its end has no mark). {_GET_AGAIN}.")
        self._path = str(file)
        self._file = pa.OSFile(self._path)
        self._places: list[int] = []
        self.group_rows: list[int] = []
        with pa.memory_map(self._path) as mapped, pa.ipc.open_stream(mapped) as stream:
            self.schema = stream.schema
            if encoded := [field.name for field in self.schema if _has_dictionary(field.type)]:
                problem = printable(f"{file} has dictionary columns ({first_few(encoded)}), which are not read")
                advice = "Remove them, or give them the type of their values, and save the data set again"
                raise DataError(f"{problem}. {advice}.")
            while True:
                place = mapped.tell()
                try:
                    batch = stream.read_next_batch()
                except StopIteration:
                    break
                self._places.append(place)
                self.group_rows.append(batch.num_rows)

    def column(self, name: str) -> Iterator["pyarrow.Array"]:
        """Yield a column in parts."""
        import pyarrow as pa

        with pa.memory_map(self._path) as mapped, pa.ipc.open_stream(mapped) as stream:
            for batch in stream:
                column = batch.column(name)
                column.validate(full=True)
                yield column

    def images(self, group: int, name: str) -> Iterator["pyarrow.Array"]:
        """Yield the bytes of an image column of one group."""
        import pyarrow as pa

        self._file.seek(self._places[group])
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(self._file), self.schema)
        column = batch.column(name)
        column.validate(full=True)
        yield _bytes(column)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _bytes(column: "pyarrow.Array") -> "pyarrow.Array":
    """Return the bytes of an image column, null where the row is."""
    import pyarrow.compute as pc

    return column if column.type.num_fields == 0 else pc.struct_field(column, "bytes")
