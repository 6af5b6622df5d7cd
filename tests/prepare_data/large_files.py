"""Small real tars, Parquet files and Arrow streams."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

MADE_ELSEWHERE = Path(__file__).parent / "made_elsewhere"
"""Training images of the colours (0, 0, 0) to (9, 0, 0), labels 0, 1, 0, ... ("a", "b"); of them, 3, 1, 2 to test.

Written by webdataset 1.0.2 and datasets 5.2.0.
"""


def png(*colour: int, size=(8, 8)) -> bytes:
    """An image file of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, (*colour, 0, 0, 0)[:3]).save(stream, "png")
    return stream.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes | str], **options) -> Path:
    """A tar with these files, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(labels: Sequence[int | None], first: int = 0) -> dict[str, bytes | str]:
    """Members of samples with the colours (first, 0, 0), ... and these labels."""
    members: dict[str, bytes | str] = {}
    for number, label in enumerate(labels, first):
        members[f"s{number:03d}.png"] = png(number)
        if label is not None:
            members[f"s{number:03d}.cls"] = str(label)
    return members


def table(images: Sequence[bytes | None], labels: Sequence[object], names: Sequence[str] | None = None) -> pa.Table:
    """A table as Hugging Face writes it; with class names, its metadata describe the columns."""
    values = [{"bytes": image, "path": None} for image in images]
    kind = pa.string() if isinstance(labels[0], str) else pa.int64()
    columns = {
        "image": pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "label": pa.array(labels, kind),
    }
    made = pa.table(columns)
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return made


def write_parquet(path: Path, content: pa.Table, rows: int = 3) -> Path:
    """A Parquet file with this many rows per group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(content, path, row_group_size=rows)
    return path


def write_arrow(folder: Path, content: pa.Table, rows: int = 3) -> Path:
    """A folder as `Dataset.save_to_disk` writes it, in two files with this many rows per batch."""
    folder.mkdir(parents=True, exist_ok=True)
    half = (len(content) + 1) // 2
    names = []
    for number, part in enumerate((content.slice(0, half), content.slice(half))):
        names.append(f"data-{number:05d}-of-00002.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as file, pa.ipc.new_stream(file, content.schema) as stream:
            stream.write_table(part, rows)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder
