"""Train the runs of presets, keep a summary of each, and make the tables of docs/reproduction.md from the summaries.

    python benchmarks/reproduction.py train digits-table digits-ablation --jobs 2
    python benchmarks/reproduction.py pages

`train` needs no DVC, which takes longer than the training for hundreds of runs. It trains in folders under --work, one
for all runs that share their data, features and training settings, and continues there after an interruption. The
summaries are in benchmarks/results/reproduction: the accuracy of every seed, commit, hardware and time.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import digit_domains
import reproduction_pages
from ruamel.yaml import YAML

import stages.train_fl.methods  # noqa: F401  registers the settings of every method
from pipeline import provenance
from pipeline.errors import PipelineError
from pipeline.io import atomic
from pipeline.progress import track
from pipeline.settings import config, presets
from pipeline.settings.config import Config
from stages.report.run import read_sweep

ROOT = Path(__file__).parents[1]
DEFAULT = "default"
"""Stands for params.yaml as it is, without a preset."""

_VARYING = ("methods", "partitions", "sweep", "report", "runtime", "analyze_features", "sweep_features")


@click.group(help=__doc__.replace("\n\n", "\n\n\b\n"))
def main() -> None:
    """Group the two commands."""


@main.command()
@click.argument("names", metavar="PRESET...", nargs=-1, required=True)
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / ".pipeline" / "reproduction", show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Runs at a time, in processes of one thread.")
@click.option("--seeds", type=int, help="Train seeds 0 to SEEDS - 1 instead of the preset's.")
@click.option("--summaries", type=click.Path(path_type=Path), default=reproduction_pages.SUMMARIES, show_default=True)
def train(names: tuple[str, ...], work: Path, jobs: int, seeds: int | None, summaries: Path) -> None:
    """Train all runs of each PRESET that are not finished, and write its summary; "default" is params.yaml itself."""
    try:
        for name in names:
            projects = [(changes, _project(work, name, changes, seeds)) for changes in _experiments(name)]
            _run([project for _, project in projects], jobs)
            summary = summarise(name, projects)
            summaries.mkdir(parents=True, exist_ok=True)
            atomic.write_json(summaries / f"{name}.json", summary)
            click.echo(summaries / f"{name}.json")
    except PipelineError as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.option("--check", is_flag=True, help="Change nothing; fail if a page differs from its summaries.")
def pages(check: bool) -> None:
    """Write the tables of docs/reproduction.md, and that of README.md, between their marks."""
    for page, text in reproduction_pages.made().items():
        if page.read_text(encoding="utf-8") == text:
            continue
        if check:
            raise click.ClickException(f"{page} differs from its summaries. Run this without --check.")
        atomic.write_text(page, text)
        click.echo(page)


def _experiments(name: str) -> list[dict[str, Any]]:
    with _params(name) as (_, applied):
        return applied.experiments if applied else [{}]


@contextlib.contextmanager
def _params(name: str) -> Iterator[tuple[Path, presets.Applied | None]]:
    """Yield a copy of params.yaml with the preset, and the preset."""
    folder = ROOT / ".pipeline"
    folder.mkdir(exist_ok=True)
    file = folder / f"reproduction-{name}.yaml"
    shutil.copy(ROOT / "params.yaml", file)
    try:
        yield file, None if name == DEFAULT else presets.apply(name, file, force=True)
    finally:
        file.unlink()


def _project(work: Path, name: str, changes: dict[str, Any], seeds: int | None) -> Config:
    """Write the project of an experiment, or return to the folder of one that shares everything but the sweep."""
    yaml = YAML()
    with _params(name) as (file, _):
        params = yaml.load(file.read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, _, entry = key.partition(".")
        params[section][entry] = value
    if seeds is not None:
        params["sweep"]["seeds"] = list(range(seeds))
    params["runtime"]["workers"] = 1
    shared = {section: values for section, values in params.items() if section not in _VARYING}
    folder = work / provenance.fingerprint(json.loads(json.dumps(shared)))[:12]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    with (folder / "params.yaml").open("w", encoding="utf-8") as stream:
        yaml.dump(params, stream)
    return config.load(folder / "params.yaml")


def _run(projects: list[Config], jobs: int) -> None:
    """Run the stages of each project, then the federated runs that are not finished, by seed."""
    runs = []
    for project in projects:
        _prepare(project)
        sweep = project.params.sweep
        runs += [
            (seed, partition, method, project)
            for seed in sweep.seeds
            for partition in sweep.partitions
            for method in sweep.methods
            if not (project.run_dir(method, partition, seed) / provenance.CHECKSUMS).exists()
        ]
    runs.sort(key=lambda run: run[0])  # a prefix of the work is then a table of fewer seeds
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for _ in track(pool.map(lambda run: _train(*run), runs), "runs", len(runs), "run"):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _prepare(project: Config) -> None:
    if project.params.prepare_data.source == "domain-folder":
        source = {"prepare_data.name": "digits", "prepare_data.source": "digits"}
        _pipeline(
            project, "prepare-data", *(word for key, value in source.items() for word in ("--set", f"{key}={value}"))
        )
        digit_domains.write(project.root)
    for stage in ("prepare-data", "prepare-backbone", "extract-features"):
        _pipeline(project, stage)
    if project.params.synthesize.images_per_class:
        _pipeline(project, "synthesize")


def _train(seed: int, partition: str, method: str, project: Config) -> None:
    _pipeline(project, "train-fl", "--method", method, "--partition", partition, "--seed", str(seed))


def _pipeline(project: Config, *words: str) -> None:
    command = [sys.executable, "-m", "pipeline", "--params", str(project.root / "params.yaml"), "--quiet", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if words[0] == "train-fl" else os.environ
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise PipelineError(f"{' '.join(words)} failed in {project.root}: {done.stderr.strip()[-500:]}")


def summarise(name: str, projects: list[tuple[dict[str, Any], Config]]) -> dict[str, Any]:
    """Return the summary of a preset's runs; PipelineError if one is missing or was made with other settings."""
    experiments, runs = [], []
    for changes, project in projects:
        found = read_sweep(project)
        runs += found.all_runs
        experiments.append(
            {
                "changes": changes,
                "partitions": found.labels,
                "baseline": found.baseline,
                "unguided": found.unguided,
                "accuracies": {
                    partition: {
                        method: [round(value, 6) for value in found.accuracies(partition, method)]
                        for method in found.methods
                    }
                    for partition in found.partitions
                },
            }
        )
    made = [run.settings.provenance for run in runs]
    return {
        "preset": name,
        "seeds": found.seeds,
        "num_rounds": min(len(run.rounds) for run in runs),
        "knn": any(run.is_knn for run in runs),
        "runs": len(runs),
        "hours": round(sum(run.metrics["wall_seconds"] for run in runs) / 3600, 2),
        "commits": sorted({(origin["commit"] or "unknown")[:12] for origin in made}),
        "hardware": sorted({_hardware(origin["hardware"]) for origin in made}),
        "torch": sorted({origin["packages"]["torch"] for origin in made}),
        "experiments": experiments,
    }


def _hardware(found: dict[str, Any]) -> str:
    return str(found.get("gpu") or f"{found['cores']} cores of {found['cpu']}")


if __name__ == "__main__":
    main()
