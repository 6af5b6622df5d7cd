"""Train the runs of presets, keep a summary of each, and make the tables of docs/reproduction.md from the summaries.

    python benchmarks/reproduction.py train digits-table digits-ablation --jobs 2
    python benchmarks/reproduction.py summarise digits-table
    python benchmarks/reproduction.py pages

`train` needs no DVC, whose own work grows with the square of the number of runs. It trains in folders under --work, one
for all runs that share their data, features and training settings, and continues there after an interruption.
`summarise` does the same without training, for the runs that are finished by then. The summaries are in
benchmarks/results/reproduction: the accuracy of every seed, commit, hardware and time. With --extend, the seeds that a
summary has stay there: the others are trained, and one seed of each method again, which must have the same accuracy.
Other hardware rounds sums differently: there the accuracy may differ by up to two points, and the page states by how
much it does.
"""

import contextlib
import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import digit_images
import reproduction_pages
from reproduction_pages import Summary
from ruamel.yaml import YAML

import stages.train_fl.methods  # noqa: F401  registers the settings of every method
from pipeline import provenance
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.io import atomic
from pipeline.progress import track
from pipeline.settings import config, presets
from pipeline.settings.config import Config
from stages.report.results import Results, check_comparable
from stages.report.run import read_sweep
from stages.report.runs import Run

ROOT = Path(__file__).parents[1]
DEFAULT = "default"
"""The name of params.yaml itself, without a preset."""

OTHER_HARDWARE = 0.02
"""The largest difference of one run's accuracy (0 to 1) on other hardware, whose rounding errors training amplifies."""

_VARYING = ("methods", "partitions", "sweep", "report", "runtime", "analyze_features", "sweep_features")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One project of a preset: the keys that it changes, its parameter file, and that file's content."""

    changes: dict[str, Any]
    params: Path
    project: Config


@click.group(help=__doc__.replace("\n\n", "\n\n\b\n"))
def main() -> None:
    """Group the commands."""


def _options(command: Any) -> Any:
    for option in (
        click.argument("names", metavar="PRESET...", nargs=-1, required=True),
        click.option("--work", type=click.Path(path_type=Path), default=ROOT / ".pipeline" / "reproduction"),
        click.option("--seeds", type=click.IntRange(min=1), help="Seeds 0 to SEEDS - 1 instead of the preset's."),
        click.option("--method", "only", multiple=True, help="Only this method of the preset; repeatable."),
        click.option("--extend", is_flag=True, help="Keep the seeds of the existing summary, and add the others."),
        click.option("--summaries", type=click.Path(path_type=Path), default=reproduction_pages.SUMMARIES),
    ):
        command = option(command)
    return command


@main.command()
@_options
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Runs at a time, in processes of one thread.",
)
def train(
    names: tuple[str, ...],
    work: Path,
    jobs: int,
    seeds: int | None,
    only: tuple[str, ...],
    extend: bool,
    summaries: Path,
) -> None:
    """Train all runs of each PRESET that are not finished, and write its summary; "default" is params.yaml itself."""
    for name in names:
        with _explained():
            experiments = _experiments(work, name, seeds, only)
            _run(experiments, jobs, _earlier(name, summaries) if extend else None)
            _write(name, experiments, extend, summaries)


@main.command()
@_options
def summarise(
    names: tuple[str, ...], work: Path, seeds: int | None, only: tuple[str, ...], extend: bool, summaries: Path
) -> None:
    """Write the summary of each PRESET's finished runs."""
    for name in names:
        with _explained():
            _write(name, _experiments(work, name, seeds, only), extend, summaries)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except PipelineError as error:
        raise click.ClickException(str(error)) from None


def _earlier(name: str, summaries: Path) -> Summary:
    try:
        return json.loads((summaries / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} does not exist. Train without --extend.") from None


def _write(name: str, experiments: list[Experiment], extend: bool, summaries: Path) -> None:
    exists = (summaries / f"{name}.json").exists()
    earlier = _earlier(name, summaries) if extend or exists else None
    summary = summary_of(name, [(one.changes, one.project) for one in experiments], earlier if extend else None)
    if earlier and (dropped := _runs(earlier) - _runs(summary)):
        raise ConfigError(
            f"{summaries / name}.json has {len(dropped)} runs that are not among these. Use --extend to keep them, or "
            "delete the file."
        )
    summaries.mkdir(parents=True, exist_ok=True)
    atomic.write_json(summaries / f"{name}.json", summary)
    click.echo(summaries / f"{name}.json")


@main.command()
@click.option("--check", is_flag=True, help="Change nothing; fail if a page differs from its summaries.")
def pages(check: bool) -> None:
    """Write the tables of docs/reproduction.md, and that of README.md, between their marks."""
    for page, text in reproduction_pages.made().items():
        if page.exists() and page.read_text(encoding="utf-8") == text:
            continue
        if check:
            raise click.ClickException(f"{page} differs from its summaries. Run this without --check.")
        atomic.write_text(page, text)
        click.echo(page)


def _experiments(work: Path, name: str, seeds: int | None, only: Sequence[str]) -> list[Experiment]:
    """Write the projects of a preset's experiments."""
    if Path(name).name != name:
        raise ConfigError(f"{name} is a path. Put the preset into presets/, and give its name.")
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{name}.yaml"
    shutil.copy(ROOT / "params.yaml", file)
    try:
        listed = [{}]
        if name != DEFAULT:
            merge = presets.merge(name, file)
            atomic.write_text(file, merge.text)
            listed = merge.experiments
    except ConfigError:
        file.unlink()
        raise
    experiments = []
    for number, changes in enumerate(listed):
        params = YAML().load(file.read_text(encoding="utf-8"))
        for key, value in changes.items():
            section, _, entry = key.partition(".")
            params[section][entry] = value
        if seeds is not None:
            params["sweep"]["seeds"] = list(range(seeds))
        if unknown := [method for method in only if method not in params["sweep"]["methods"]]:
            raise ConfigError(f"{name} has no method {unknown[0]}. Use one of {', '.join(params['sweep']['methods'])}.")
        if only:
            params["sweep"]["methods"] = list(only)
        params["runtime"]["workers"] = 1
        own = _write_params(work, f"{name}-{number}.yaml", params)
        experiments.append(Experiment(changes, own, config.load(own)))
    return experiments


def _write_params(work: Path, name: str, params: Any) -> Path:
    """Write a parameter file to the folder of all that share everything but the sweep, and return its path."""
    shared = {section: values for section, values in params.items() if section not in _VARYING}
    folder = work / provenance.fingerprint(json.loads(json.dumps(shared)))[:12]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for place in ("benchmarks", "data/raw", "data/corpus"):  # which presets name by relative paths
        (ROOT / place).mkdir(parents=True, exist_ok=True)
        if not (folder / place).exists():
            (folder / place).symlink_to(ROOT / place)
    with atomic.replace_file(folder / name) as temporary, temporary.open("w", encoding="utf-8") as stream:
        YAML().dump(params, stream)
    return folder / name


def _run(experiments: list[Experiment], jobs: int, earlier: Summary | None) -> None:
    """Run the stages of each experiment, then the federated runs that are not finished, by seed."""
    runs = []
    for one in experiments:
        _prepare(one)
        project, sweep = one.project, one.project.params.sweep
        known = seeds_to_keep(earlier, one.changes)
        runs += [
            (seed, partition, method, one)
            for seed in sweep.seeds
            for partition in sweep.partitions
            for method in sweep.methods
            if seed not in known.get((partition, method), ()) and not _is_finished(project, method, partition, seed)
        ]
    runs.sort(key=lambda run: run[0])  # a prefix of the work is then a table of fewer seeds
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for _ in track(pool.map(lambda run: _train(*run), runs), "runs", len(runs), "run"):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _prepare(one: Experiment) -> None:
    params = one.project.params
    if params.prepare_data.name == "digits-domains":
        _pipeline(one, "prepare-data", "--set", "prepare_data.name=digits", "--set", "prepare_data.source=digits")
        digit_images.write_domains(one.project.root, ROOT)
    if params.prepare_backbone.corpus == "data/corpus/rendered-digits":
        digit_images.write_corpus(ROOT)
    for stage in ("prepare-data", "prepare-backbone", "extract-features", "analyze-features"):
        _pipeline(one, stage)
    if params.synthesize.images_per_class:
        _pipeline(one, "synthesize")


def _train(seed: int, partition: str, method: str, one: Experiment) -> None:
    _pipeline(one, "train-fl", "--method", method, "--partition", partition, "--seed", str(seed))


def _pipeline(one: Experiment, *words: str) -> None:
    command = [sys.executable, "-m", "pipeline", "--params", str(one.params), "--quiet", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if words[0] == "train-fl" else os.environ
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise PipelineError(f"{' '.join(words)} failed with {one.params}: {done.stderr.strip()[-500:]}")


def _is_finished(project: Config, method: str, partition: str, seed: int) -> bool:
    return (project.run_dir(method, partition, seed) / provenance.CHECKSUMS).exists()


def seeds_to_keep(earlier: Summary | None, changes: dict[str, Any]) -> dict[tuple[str, str], set[int]]:
    """Return the seeds of an earlier summary that need no training, by partition and method.

    These are all but the first seed of each method on its first partition.
    """
    kept: dict[tuple[str, str], set[int]] = {}
    repeated: set[str] = set()
    for partition, method, seed, _ in _known(earlier, changes):
        own = kept.setdefault((partition, method), set())
        if method in repeated:
            own.add(seed)
        repeated.add(method)
    return kept


def _known(earlier: Summary | None, changes: dict[str, Any]) -> list[tuple[str, str, int, float]]:
    found = earlier["experiments"] if earlier else []
    return [run for one in found if one["changes"] == changes for run in _each(one)]


def extended(earlier: Summary, added: Summary) -> Summary:
    """Return the runs of both summaries as one.

    A run that both have keeps its earlier accuracy, so that a seed of a method and of its counterpart without guidance
    are from one machine.

    Raises:
        DataError: The accuracies of a run that both have differ, no run of a method with new ones is in both, or a seed
            of a method would be compared with one from other hardware: of the same method without or with guidance.
    """
    result = copy.deepcopy(earlier)
    is_one_machine = len({*earlier["hardware"], *added["hardware"]}) == 1
    tolerance = 1e-6 if is_one_machine else OTHER_HARDWARE
    largest = earlier.get("largest_difference", 0.0)
    result["num_rounds"] = min(earlier["num_rounds"], added["num_rounds"])
    result["hours"] = round(earlier["hours"] + added["hours"], 2)
    for key in ("commits", "hardware", "torch"):
        result[key] = sorted({*earlier[key], *added[key]})
    for new in added["experiments"]:
        own = next((one for one in result["experiments"] if one["changes"] == new["changes"]), None)
        if own is None:
            result["experiments"].append(new)
            continue
        own["features"] = new["features"] or own["features"]
        own["baseline"] = own["baseline"] or new["baseline"]
        for key in ("partitions", "unguided"):
            own[key] |= new[key]
        before = {run[:3]: run[3] for run in _each(own)}
        repeated = {method for partition, method, seed, _ in _each(new) if (partition, method, seed) in before}
        for partition, method, seed, accuracy in _each(new):
            where = f"{added['preset']}: {method} on {partition}, seed {seed}"
            old = before.get((partition, method, seed))
            if old is not None:
                largest = max(largest, abs(old - accuracy))
                if abs(old - accuracy) > tolerance:
                    raise DataError(
                        f"{where}: accuracy {accuracy} here, and {old} in the existing summary: code, settings or "
                        "machine differ. Train all seeds, without --extend."
                    )
                continue
            compared = [other for other in _counterparts(own, method) if (partition, other, seed) in before]
            if compared and not is_one_machine:
                raise DataError(
                    f"{where}: {compared[0]}, with which it is compared, was trained on other hardware. Train other "
                    "seeds, or all without --extend."
                )
            if method not in repeated and any(known == method for _, known, _ in before):
                raise DataError(f"{where}: no seed of the existing summary was trained again. Run `train` to its end.")
            by_seed = own["accuracies"].setdefault(partition, {}).setdefault(method, {})
            by_seed[str(seed)] = accuracy
            own["accuracies"][partition][method] = dict(sorted(by_seed.items(), key=lambda item: int(item[0])))
    result["runs"] = sum(1 for one in result["experiments"] for _ in _each(one))
    if largest > 0:
        result["largest_difference"] = round(largest, 6)
    return result


def _counterparts(experiment: dict[str, Any], method: str) -> set[str]:
    """Return the methods that a method is compared with: its own without guidance, or those that add guidance to it."""
    pairs = experiment["unguided"].items()
    return {plain for guided, plain in pairs if guided == method} | {
        guided for guided, plain in pairs if plain == method
    }


def _runs(summary: Summary) -> set[tuple[str, str, str, int]]:
    return {(str(one["changes"]), *run[:3]) for one in summary["experiments"] for run in _each(one)}


def _each(experiment: dict[str, Any]) -> Iterator[tuple[str, str, int, float]]:
    """Yield partition, method, seed and accuracy of each run of a summary's experiment."""
    for partition, by_method in experiment["accuracies"].items():
        for method, by_seed in by_method.items():
            for seed, accuracy in by_seed.items():
                yield partition, method, int(seed), accuracy


def summary_of(name: str, projects: list[tuple[dict[str, Any], Config]], earlier: Summary | None = None) -> Summary:
    """Return the summary of a preset's finished runs, with those of an earlier summary if there is one.

    Accuracies are by partition, method and seed, from 0 to 1.

    Raises:
        PipelineError: A run is damaged, was made with other settings, or differs from the earlier summary.
    """
    experiments, runs, seconds = [], [], 0.0
    for changes, project in projects:
        found = _finished(project)
        if found is None:
            continue
        runs += found.all_runs
        known = [run[:3] for run in _known(earlier, changes)]
        seconds += sum(
            run.metrics["wall_seconds"]
            for (partition, method), group in found.runs.items()
            for run in group
            if (partition, method, run.seed) not in known
        )
        accuracies: dict[str, dict[str, dict[int, float]]] = {partition: {} for partition in found.partitions}
        for (partition, method), group in found.runs.items():
            accuracies[partition][method] = {run.seed: round(run.metrics["mean_last5_accuracy"], 6) for run in group}
        experiments.append(
            {
                "changes": changes,
                "partitions": found.labels,
                "baseline": found.baseline,
                "unguided": found.unguided,
                "accuracies": accuracies,
                "features": _measured(project),
            }
        )
    if not runs:
        raise DataError(f"No run of {name} is finished. Train one first.")
    made = [run.settings.provenance for run in runs]
    summary = {
        "preset": name,
        "num_rounds": min(len(run.rounds) for run in runs),
        "runs": len(runs),
        "hours": round(seconds / 3600, 2),
        "commits": sorted({reproduction_pages.short_commit(origin) for origin in made}),
        "hardware": sorted({_hardware(origin["hardware"]) for origin in made}),
        "torch": sorted({origin["packages"]["torch"] for origin in made}),
        "experiments": experiments,
    }
    return extended(earlier, summary) if earlier else summary


def _measured(project: Config) -> dict[str, float] | None:
    """Return what analyze-features measured of the fused features, None if it did not run."""
    file = project.root / "analysis" / "details.json"
    if not file.exists():
        return None
    fused = json.loads(file.read_text(encoding="utf-8"))["layers"]["fused"]
    return {"probe": fused["probe_accuracy"], "margin": fused["margin"], "separation": fused["separation"]}


def _finished(project: Config) -> Results | None:
    """Read the finished runs of a sweep, None if there is none."""
    sweep = project.params.sweep
    runs: dict[tuple[str, str], list[Run]] = {}
    for partition in sweep.partitions:
        for method in sweep.methods:
            seeds = [seed for seed in sweep.seeds if _is_finished(project, method, partition, seed)]
            if seeds:
                only = sweep.model_copy(update={"methods": [method], "partitions": [partition], "seeds": seeds})
                params = project.params.model_copy(update={"sweep": only})
                runs |= read_sweep(dataclasses.replace(project, params=params)).runs
    if not runs:
        return None
    check_comparable(runs.values())
    partitions = [name for name in sweep.partitions if any(partition == name for partition, _ in runs)]
    methods = [name for name in sweep.methods if (partitions[0], name) in runs]
    return Results(methods, partitions, sweep.seeds, runs, [])


def _hardware(found: dict[str, Any]) -> str:
    return str(found.get("gpu") or f"{found['cores']} cores of {found['cpu']}")


if __name__ == "__main__":
    main()
