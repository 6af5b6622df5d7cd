"""How much time DVC itself takes for a sweep, in CPU seconds: the stages only copy the files of a run, for each seed.

python benchmarks/dvc_time.py 50 100 1000
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from pipeline import project

FILES = ("rounds.csv", "timing.csv", "clients.csv", "details.json", "partition.json", "partition.svg", "config.json",
         "model.safetensors", "metrics.json", "SHA256SUMS")  # fmt: skip
SCRIPT = """#!/bin/sh
# pipeline train-fl --method METHOD --partition PARTITION --overwrite
group=$3-$5
mkdir -p results/$group results/.sweep
for seed in {seeds}; do mkdir -p results/$group/s$seed && cp template/* results/$group/s$seed/; done
echo $group > results/.sweep/$group.sha256
echo '{{"num_seeds": 1}}' > results/$group.json
"""


def measure(runs: int, seeds: int) -> tuple[float, float]:
    """Return the CPU seconds (user + system) of `dvc repro` on a new sweep, and on the finished one."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        project.create(root)
        _write(root, runs // seeds, seeds)
        command = [sys.executable, "-m", "dvc", "repro", "--single-item", "train-fl"]
        environment = os.environ | {"DVC_SITE_CACHE_DIR": str(root / ".dvc" / "site"), "DVC_NO_ANALYTICS": "1"}
        used = [_used()]
        for _ in range(2):
            subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
            used.append(_used())
        assert len(list(root.glob("results/*/s*/SHA256SUMS"))) == runs
        return used[1] - used[0], used[2] - used[1]


def _write(root: Path, stages: int, seeds: int) -> None:
    """Write what the stages read, a program in place of the real one, and a sweep of so many stages and seeds."""
    methods = [f"method{number}" for number in range(stages)]
    params = (root / "params.yaml").read_text(encoding="utf-8")
    more = "".join(f"  {name}: {{algorithm: fedprox, proximal_mu: 0.{name[6:]}1}}\n" for name in methods)
    params = re.sub("^methods:.*\n", lambda found: found[0] + more, params, flags=re.MULTILINE)
    head, _, tail = params.partition("\nsweep:")
    sweep = f"\nsweep:\n  methods: [{', '.join(methods)}]\n  partitions: [dir05]\n  seeds: {list(range(seeds))}\n\n"
    (root / "params.yaml").write_text(head + sweep + tail[tail.index("report:") :], encoding="utf-8")
    for folder in ("data/datasets/digits", "data/features/digits-tiny-sd-t300", "template"):
        (root / folder).mkdir(parents=True)
        for number, name in enumerate(FILES):
            (root / folder / name).write_text(f"{number}\n" * 1000)
    program = root / ".venv" / "bin" / "pipeline"
    program.parent.mkdir(parents=True)
    program.write_text(SCRIPT.format(seeds=" ".join(map(str, range(seeds)))))
    program.chmod(0o755)


def _used() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@click.command()
@click.argument("runs", nargs=-1, required=True, type=int)
@click.option("--seeds", default=10, show_default=True, help="Per stage.")
def main(runs: tuple[int, ...], seeds: int) -> None:
    """Measure sweeps of so many RUNS."""
    for count in runs:
        if count % seeds:
            raise click.ClickException(f"{count} runs are not whole stages of {seeds} seeds. Choose a multiple.")
        new, finished = measure(count, seeds)
        click.echo(f"{count} runs in {count // seeds} stages: {new:.0f} s, again {finished:.0f} s")


if __name__ == "__main__":
    main()
