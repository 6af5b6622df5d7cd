"""Make a new project from the package's own files.

The repository is itself a project: its files exist once, at its top level. A wheel holds copies of them in
`pipeline/template` (see setup.py, which imports this module, so it may import nothing that a build lacks).
"""

import contextlib
import os
from pathlib import Path

from pipeline.errors import ConfigError

TEMPLATE = "template"
FILES = (
    "params.yaml", "dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvc/plots/fl_curves.json",
    ".dvcignore", ".gitignore", "data/README.md", "data/synthetic/none", "data/corpus/none",
)  # fmt: skip
"""What a project consists of before any stage has run."""


def source() -> Path:
    """Return the folder with `FILES` and `presets/`: in a wheel the template, in a clone the repository."""
    template = Path(__file__).parent / TEMPLATE
    return template if template.is_dir() else template.parents[1]


def create(folder: Path) -> None:
    """Write the files of a new project into a folder; outside a git repository, DVC is set to work without one.

    Raise ConfigError if the folder has one of the files, PipelineError if one cannot be written; nothing is left then.
    """
    from pipeline.io import atomic

    if existing := [name for name in FILES if os.path.lexists(folder / name)]:
        raise ConfigError(f"{folder} already has {', '.join(existing)}. Choose another folder, or move them away.")
    in_git = any((parent / ".git").exists() for parent in (folder.resolve(), *folder.resolve().parents))
    files = [folder / name for name in FILES]
    new_folders = {parent for file in files for parent in file.parents if not parent.exists()}
    try:
        for name in FILES:
            content = (source() / name).read_bytes()
            if name == ".dvc/config" and not in_git:
                content = content.replace(b"[core]\n", b"[core]\n    no_scm = true\n")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(folder / name, content)
    except BaseException:
        for file in files:
            with contextlib.suppress(OSError):
                file.unlink()
        for parent in sorted(new_folders, reverse=True):  # the inner ones first
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
