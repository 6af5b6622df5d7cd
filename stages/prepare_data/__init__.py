"""Stage prepare-data: images of any source -> data/datasets/<name>."""

from stages.prepare_data.run import run

__all__ = ["run"]
