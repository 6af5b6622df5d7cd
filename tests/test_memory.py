"""The free memory of a machine, of control groups of both versions, and below a process's own limits."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import memory

MB = 2**20


@pytest.fixture
def machine(tmp_path):
    """Return a function that writes files of /proc and /sys; there are 1,000 MB available."""

    def write(files: dict[str, object]) -> Path:
        for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  1024000 kB\n", **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        return tmp_path

    return write


def version_2(folder: str, limit: object, used: int, files: int = 0) -> dict[str, object]:
    stat = f"anon 5\nfile {2 * files}\ninactive_file {files // 2}\nactive_file {files - files // 2}"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def test_a_system_without_proc_sets_no_limit(tmp_path):
    assert memory.available(tmp_path) == memory.UNLIMITED


def test_a_machine_has_what_the_kernel_can_give(machine):
    assert memory.available(machine({})) == 1000 * MB


def test_a_group_leaves_its_limit_without_what_is_used_except_for_files(machine):
    own = {"proc/self/cgroup": "0::/jobs/mine"}
    assert memory.available(machine(own | version_2("sys/fs/cgroup/jobs/mine", 500 * MB, 300 * MB))) == 200 * MB
    files = version_2("sys/fs/cgroup/jobs/mine", 500 * MB, 300 * MB, files=120 * MB)
    assert memory.available(machine(own | files)) == 320 * MB
    assert memory.available(machine(own | version_2("sys/fs/cgroup/jobs/mine", "max", 300 * MB))) == 1000 * MB


def test_the_groups_above_limit_a_process_too(machine):
    groups = version_2("sys/fs/cgroup/jobs/mine", "max", 10 * MB) | version_2("sys/fs/cgroup/jobs", 90 * MB, 50 * MB)
    assert memory.available(machine({"proc/self/cgroup": "0::/jobs/mine", **groups})) == 40 * MB
    # more is used than a lowered limit allows
    over = version_2("sys/fs/cgroup/jobs", 40 * MB, 50 * MB)
    assert memory.available(machine({"proc/self/cgroup": "0::/jobs/mine", **over})) == 0


def test_a_container_that_sees_the_path_of_the_host_uses_the_topmost_group(machine):
    inside = version_2("sys/fs/cgroup", 64 * MB, 4 * MB)
    assert memory.available(machine({"proc/self/cgroup": "0::/docker/0123", **inside})) == 60 * MB


def test_groups_of_version_1(machine):
    folder = "sys/fs/cgroup/memory/slurm/job"
    stat = f"inactive_file 7\ntotal_inactive_file {2 * MB}\ntotal_active_file {3 * MB}"
    group = {f"{folder}/memory.limit_in_bytes": 200 * MB, f"{folder}/memory.usage_in_bytes": 80 * MB}
    listed = "9:cpu,cpuacct:/slurm/job\n4:memory:/slurm/job\n0::/"
    root = machine({"proc/self/cgroup": listed, f"{folder}/memory.stat": stat, **group})
    assert memory.available(root) == 125 * MB
    unlimited = {"sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
                 "sys/fs/cgroup/memory/memory.usage_in_bytes": 900 * MB}  # fmt: skip
    assert memory.available(machine(unlimited)) == 125 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce the limits")
@pytest.mark.parametrize(("limit", "used"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_a_process_has_no_more_than_its_own_limit_leaves(limit, used):
    code = f"""
import re, resource
from pathlib import Path
from pipeline import memory
used = 1024 * int(re.search(r"{used}:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.{limit}, (used + {100 * MB},) * 2)
before = memory.available()
held = bytearray({60 * MB})
print(before, memory.available())
try:
    bytearray({60 * MB})
except MemoryError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after, refused = done.stdout.split()
    assert refused == "refused"  # so the limit is real, and what is said to be left is less than that
    assert 90 * MB < int(before) <= 100 * MB and 30 * MB < int(after) <= 40 * MB


FAULTS = """
import resource
from pipeline import memory
{}
def step():
    return len([b"x" * (8 << 20) for _ in range(4)])
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Prints how many pages the system provides for 160 MB that are allocated and freed in turn."""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="other allocators behave otherwise")
@pytest.mark.parametrize(
    "call, environment, is_kept",
    [
        ("from pipeline.cli.commands import main; main(['preset'], standalone_mode=False)", {}, True),  # any command
        ("", {}, False),
        ("memory.keep_freed()", {"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ("memory.keep_freed()", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, False),
    ],
)
def test_freed_memory_is_kept_unless_the_user_decides(call, environment, is_kept):
    command = [sys.executable, "-c", FAULTS.format(call)]
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))
    }
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True)
    assert (int(done.stdout.split()[-1]) < 100) == is_kept, done.stdout
