"""Provenance of an output: fingerprints, checksums, the code's commit, software and hardware.

It is written beside every output, and contains no time, path or host name, so that equal work gives equal bytes.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pipeline
from pipeline.io import atomic
from pipeline.io.system_errors import reading, refusal

_PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "h5py", "numpy", "scikit-learn")
CHECKSUMS = "SHA256SUMS"


def fingerprint(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of canonical JSON, as 64 hexadecimal digits: equal content gives equal fingerprints."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; raise SystemRefusal if it is unreadable, OSError if missing."""
    with reading(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe(device: str | None = None) -> dict[str, Any]:
    """Return `software`, and as hardware the processor, its usable cores, and the GPU's name if `device` is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware: dict[str, Any] = {"cpu": _cpu_name(), "cores": cores}
    if device and device.startswith("cuda"):
        hardware["gpu"] = processor(device)
    return software() | {"hardware": hardware}


def software() -> dict[str, Any]:
    """Return the code's commit and the versions of Python and the packages."""
    return {
        "feddifrc": pipeline.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def git_commit() -> str | None:
    """Return the commit of the running code, with "-dirty" if files were changed since; None if git does not track it.

    An installed package may lie in a repository of something else. Raise SystemRefusal if git cannot be started now,
    for example because too many files are open.
    """
    file = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (FileNotFoundError, PermissionError, subprocess.SubprocessError):  # no git, no repository, not tracked
        return None
    except OSError as error:
        raise refusal(error, file.parent) or error from None


@functools.cache
def code_sha256() -> str:
    """Return the SHA-256 of the running code, for an installed package or a Flower app, which have no commit.

    It is that of the first call, when a run begins. Later edits hardly reach a process that has loaded the code.
    """
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(file for top in ("pipeline", "stages") for file in (root / top).rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def processor(device: str) -> str:
    """Return the name of the GPU or processor of a torch device."""
    if not device.startswith("cuda"):
        return _cpu_name()
    import torch

    return torch.cuda.get_device_name(device)


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS of the files in `folder`, in the format of sha256sum, without hidden and temporary files.

    All of them are synced to the disk before it appears, so that it also holds after a power cut.
    """
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and _is_content(file.name))
    with atomic.replace_file(folder / CHECKSUMS) as temporary:
        temporary.write_bytes("".join(f"{file_sha256(folder / name)}  {name}\n" for name in names).encode())
        for name in names:
            atomic.sync_to_disk(folder / name)


def listed_files(folder: Path) -> list[str]:
    """Return the names in SHA256SUMS of `folder`; raise FileNotFoundError if it is missing."""
    return list(_checksums(folder))


def changed_file(folder: Path, names: Iterable[str]) -> str | None:
    """Return the first of these files in `folder` that differs from SHA256SUMS there.

    Return SHA256SUMS itself if it does not list one of them. Raise FileNotFoundError if SHA256SUMS or one of the files
    is missing.
    """
    expected = _checksums(folder)
    for name in names:
        if name not in expected:
            return CHECKSUMS
        if file_sha256(folder / name) != expected[name]:
            return name
    return None


def _checksums(folder: Path) -> dict[str, str]:
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}


def _is_content(name: str) -> bool:
    return name != CHECKSUMS and not name.startswith(".") and not name.endswith(".tmp")


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None
