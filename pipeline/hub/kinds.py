"""What a repository of the hub holds, and how messages name it and the setting that chose it."""

from dataclasses import dataclass
from typing import Literal

CONVERT = (
    "Convert it with save_pretrained of diffusers as docs/models.md shows, and set prepare_backbone.source to the new "
    "directory."
)


@dataclass(frozen=True)
class Kind:
    """Models or data sets."""

    type: Literal["model", "dataset"]
    noun: str
    setting: str  # that names a repository
    pin: str  # how to write a commit, as an imperative without its period
    no_id: str  # the error for a name that is not an id of the hub
    local: str  # what else to set if the hub cannot be used
    files: tuple[str, ...]  # endings of single files
    no_file: str  # what is said of the name of a single file

    @property
    def prefix(self) -> str:
        """What is before an id in the addresses of pages."""
        return "datasets/" if self.type == "dataset" else ""


MODEL = Kind(
    "model",
    "model",
    "prepare_backbone.source",
    "Set prepare_backbone.revision to a commit (40 hexadecimal digits)",
    "is neither embedded, nor a directory, nor a hub id. Check the path, or write organisation/model.",
    "set prepare_backbone.source to a directory that holds the model",
    (".safetensors", ".ckpt", ".gguf"),
    f"is a single-file model. {CONVERT}",
)
DATASET = Kind(
    "dataset",
    "data set",
    "prepare_data.path",
    "Write it after the id in prepare_data.path, as organisation/name@COMMIT (40 hexadecimal digits)",
    "is neither a folder nor a data set's id on the hub. Check the path, or write organisation/name@COMMIT.",
    "set prepare_data.path to a folder that holds the data set",
    (".parquet", ".arrow", ".tar"),
    "is a single file that does not exist here. Check the path; for a data set on the hub, write organisation/name.",
)
