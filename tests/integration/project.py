"""A project as a clone of the repository has it, with small parameters: under git and DVC."""

import shutil
import subprocess
from pathlib import Path

from tests.conftest import REPOSITORY

TRACKED = (
    "dvc.yaml",
    ".dvcignore",
    ".gitignore",
    ".dvc/.gitignore",
    ".dvc/config",
    "data/README.md",
    "data/synthetic/none",
)


def copy_tracked(into: Path) -> None:
    """Copies what git has for DVC, without params.yaml."""
    for name in TRACKED:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, into / name)
    shutil.copytree(REPOSITORY / ".dvc" / "plots", into / ".dvc" / "plots", dirs_exist_ok=True)


def git(root: Path, *arguments: str) -> str:
    """A git command as nobody in particular; it must succeed."""
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
    done = subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout
