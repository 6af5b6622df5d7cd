"""Writes the accuracies of a preset's runs into docs/reproduction.md, between the marks that bear its name.

    pipeline preset digits-table --run
    python benchmarks/reproduction.py digits-table

Every run must have been made with what params.yaml says now; a run of other settings is named and nothing is written.
"""

import json
from pathlib import Path

import click

from pipeline import accuracy
from pipeline.errors import PipelineError
from pipeline.settings import config
from pipeline.settings.config import Config

ROOT = Path(__file__).parents[1]


@click.command()
@click.argument("preset")
@click.option("--params", type=click.Path(path_type=Path), default=ROOT / "params.yaml", help="The parameter file.")
@click.option("--page", type=click.Path(path_type=Path), default=ROOT / "docs" / "reproduction.md", help="The page.")
def main(preset: str, params: Path, page: Path) -> None:
    """Fills the table of PRESET."""
    try:
        table = make_table(config.load(params))
        page.write_text(put(page.read_text(encoding="utf-8"), preset, table), encoding="utf-8")
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    click.echo(table)


def make_table(project: Config) -> str:
    """Methods by partitions, of the sweep in params.yaml."""
    sweep = project.params.sweep
    lines = [["method", *sweep.partitions], ["---"] * (1 + len(sweep.partitions))]
    commits = set()
    for method in sweep.methods:
        cells = []
        for partition in sweep.partitions:
            runs = [_read(project, method, partition, seed) for seed in sweep.seeds]
            commits |= {commit for _, commit in runs}
            cells.append(accuracy.in_percent([found for found, _ in runs]))
        lines.append([method, *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    words = f"{accuracy.rounds_in_words(project.params.train_fl.num_rounds)}; {accuracy.seeds_in_words(sweep.seeds)}"
    commit = ", ".join(sorted(commit[:12] for commit in commits))
    return f"{table}\n\n{words[0].upper()}{words[1:]}; commit {commit}."


def put(page: str, preset: str, table: str) -> str:
    """The page with `table` between the marks of `preset`."""
    start, end = f"<!-- {preset} -->\n", f"<!-- /{preset} -->"
    if start not in page or end not in page:
        raise PipelineError(f"the page has no marks {start.strip()} and {end}")
    return page[: page.index(start) + len(start)] + table + "\n" + page[page.index(end) :]


def _read(project: Config, method: str, partition: str, seed: int) -> tuple[float, str]:
    """A run's accuracy and commit, after checking that it was made with these settings."""
    folder = project.run_dir(method, partition, seed)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{folder} does not hold a finished run ({error}): run `dvc repro`") from None
    project.check_settings_of_run(folder, settings, method, partition)
    return metrics["mean_last5_accuracy"], settings["provenance"]["commit"] or "unknown"


if __name__ == "__main__":
    main()
