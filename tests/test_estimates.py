"""What an estimate says about a process."""

from pipeline import estimates


def test_memory_and_descriptors_to_come_are_added_to_those_so_far(monkeypatch):
    monkeypatch.setattr("pipeline.memory.peak", lambda: 1_000_000_000)
    now, more = (estimates.of_process("cpu", *numbers) for numbers in ((), (500_000_000, 7, 30)))
    assert now[0].startswith("memory        1 GB per process") and more[0].startswith(
        "memory        1.5 GB per process"
    )
    opened = [int(lines[1].split()[2]) for lines in (now, more)]
    assert opened[1] - opened[0] == 30
