"""A project with the files of a clone, under git and DVC."""

import shutil
import subprocess
from pathlib import Path

from pipeline import project
from tests.conftest import REPOSITORY

QUICK = {
    "prepare_data.train_subset": 60,
    "extract_features.negatives": 1,
    "extract_features.basis_images": 20,
    "analyze_features.splits": 1,
    "analyze_features.tsne_images": 20,
    "analyze_features.perplexity": 5.0,
}
"""Settings under which the stages take little longer than their processes' start."""


def copy_tracked(into: Path) -> None:
    """Copy the files that a clone has for DVC, without params.yaml."""
    for name in project.FILES[1:]:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, into / name)


def copy_repository(into: Path) -> None:
    """Copy the files that git tracks or would track."""
    names = git(REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, names.split("\0")):
        if (REPOSITORY / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            (into / name).write_bytes((REPOSITORY / name).read_bytes())


def git(root: Path, *arguments: str) -> str:
    """Run a git command with a made-up identity; it must succeed."""
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
    done = subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout
