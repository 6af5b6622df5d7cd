"""Small real projects: the repository's own params.yaml, scaled down to run in seconds."""

import atexit
import functools
import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from filelock import FileLock

from pipeline.cli.commands import main
from tests.integration import forked

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-")  # read when huggingface_hub is imported
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"  # tests of downloads start their own server

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job, whose children would ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_fit_for_tests(folder: str) -> bool:
    if not os.access(folder, os.W_OK) or shutil.disk_usage(folder).free < 4 << 30:
        return False
    return (
        not os.statvfs(folder).f_flag & os.ST_NOEXEC
    )  # as containers mount it; some tests run programs that they write


if _is_fit_for_tests("/dev/shm"):  # in memory; on a disk, most outputs would wait for fsync
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")  # where pytest puts tmp_path

REPOSITORY = Path(__file__).parents[1]

SMALL = {
    "prepare_data.train_subset": 120,
    "extract_features.basis_images": 40,
    "extract_features.negatives": 1,  # three passes per image instead of eleven
    "extract_features.rows_per_shard": 50,
    "train_fl.num_clients": 3,
    "train_fl.clients_per_round": 2,
    "train_fl.num_rounds": 2,
    "train_fl.local_epochs": 1,
    "sweep.partitions": ["dir05"],
    "sweep.seeds": [0],
    "runtime.device": "cpu",
    "runtime.unet_batch_size": 50,  # a shard has 150 passes; 192 would be computed
}


def write_params(root: Path, changes: Mapping[str, Any]) -> Path:
    """Write the repository's params.yaml, overridden by SMALL and `changes` (dotted keys), into `root`."""
    (root / "params.yaml").write_text(_params({**SMALL, **changes}), encoding="utf-8")
    return root / "params.yaml"


@functools.cache
def _sections() -> Mapping[str, Mapping[str, str]]:
    """The lines of each key of each section of the repository's params.yaml, which takes long to parse and to dump.

    It knows the file's layout only: sections, keys at two spaces, and deeper lines of the key before.
    """
    sections: dict[str, dict[str, str]] = {}
    for line in (REPOSITORY / "params.yaml").read_text(encoding="utf-8").splitlines(keepends=True):
        name = line.partition(":")[0]
        if re.match(r"\w", name):
            keys = sections.setdefault(name, {"": line})
        elif re.match(r"  [\w-]", name):
            keys[key := name.strip()] = line
        elif line.startswith("    "):
            keys[key] += line
        else:
            assert line.lstrip().startswith("#") or not line.strip(), line
    return sections


def _params(changes: Mapping[str, Any]) -> str:
    sections = {name: dict(keys) for name, keys in _sections().items()}
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        sections[section][key] = f"  {key}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n"
    return "".join(text for keys in sections.values() for text in keys.values())


LONG = (
    "integration/test_federation.py",
    "integration/test_federation_tls.py",
    "integration/test_experiments.py",
    "integration/test_dvc.py",
    "integration/test_team.py",
    "extract_features/test_extraction.py",
    "train_fl/test_flower_engine.py",
    "faults/",
    "test_notebook.py",
    "integration/",
    "analyze_features/test_sweep_cache.py",
    "test_dtypes.py",
    "train_fl/",
    "report/",
    "test_benchmarks.py",
    "fuzz/",
)
"""Modules that take long, longest first; tests of short ones then fill the end of a parallel run."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while the tests and libraries are imported, and never search them for it: it takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the modules that take long; a module's tests stay together."""

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(REPOSITORY / "tests").as_posix()
        return next((number for number, long in enumerate(LONG) if name.startswith(long)), len(LONG))

    items.sort(key=place)


def pytest_configure(config: pytest.Config) -> None:
    """Start the server of quick programs, which all workers share; it imports nothing before the first program."""
    if forked.ADDRESS not in os.environ:
        config.add_cleanup(forked.start())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Fork the workers from that server, so that the libraries are imported once for all of them."""
    folder = tempfile.TemporaryDirectory(prefix="workers-")
    config.add_cleanup(folder.cleanup)
    forked.write_programs(Path(folder.name), "python")
    for spec in specs:
        spec.python = shlex.quote(str(Path(folder.name) / "python"))


def pytest_xdist_auto_num_workers() -> int:
    """Use one worker more than there are cores: some tests wait for servers."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 7) + 1


@pytest.fixture(scope="session", autouse=True)
def methods_are_registered() -> None:
    """Register the methods' settings; imported here, for the process that only starts the workers needs no torch."""
    import stages.train_fl.methods  # noqa: F401


@pytest.fixture(scope="session")
def quick_python() -> Iterator[str]:
    """A Python that has imported the libraries already, for programs that are killed or limited: see forked.py."""
    with tempfile.TemporaryDirectory(prefix="bin-") as name:
        forked.write_programs(Path(name), "python")
        yield str(Path(name) / "python")


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """For signals to this process: Python loses one that arrives in a collector's callback, and hypothesis sets one."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def quick_dry_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let dry runs time as few passes as possible, where no seconds are compared."""
    monkeypatch.setattr("stages.extract_features.cost._TIMED_SECONDS", 0.0)
    monkeypatch.setattr("stages.extract_features.cost._TIMED_BATCHES", 1)


Pipeline = Callable[..., Result]


def invoke(root: Path, *arguments: str) -> Result:
    """Run one command in the project at `root`, in this process."""
    return CliRunner().invoke(main, ["--params", str(root / "params.yaml"), *arguments], catch_exceptions=False)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that `make` fills once for all workers of a parallel run; tests must not modify it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, mark = base / name, base / f"{name}.made"
    with FileLock(base / f"{name}.lock"):
        if not mark.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            mark.touch()
    return folder


def _extract(root: Path) -> None:
    write_params(root, {})
    for command in ("prepare-data", "prepare-backbone", "extract-features"):
        result = invoke(root, command)
        assert result.exit_code == 0, result.output


@pytest.fixture(scope="session")
def extracted(tmp_path_factory) -> Path:
    """Make a small project with data, backbone and features; tests share it and must not modify it."""
    return made_once(tmp_path_factory, "extracted", _extract)


@pytest.fixture
def project(extracted, tmp_path) -> Path:
    """Make a project that shares the data and features of `extracted` through a link."""
    write_params(tmp_path, {})
    (tmp_path / "data").symlink_to(extracted / "data")
    return tmp_path


@pytest.fixture
def disk(tmp_path):
    """A separate file system of 24 MB."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting needs root")
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)  # even if a test that failed holds a file
