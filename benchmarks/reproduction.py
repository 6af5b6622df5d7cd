"""Write the accuracies of a preset's runs into docs/reproduction.md, between the marks with the preset's name.

    pipeline preset digits-table --run
    python benchmarks/reproduction.py digits-table

Every run must have been made with the current params.yaml; otherwise the benchmark names the run and writes nothing.
"""

from pathlib import Path

import click

import stages.train_fl.methods  # noqa: F401  registers the settings of every method
from pipeline import accuracy
from pipeline.errors import PipelineError
from pipeline.settings import config
from pipeline.settings.config import Config
from stages.report.run import read_sweep

ROOT = Path(__file__).parents[1]


@click.command()
@click.argument("preset")
@click.option("--params", type=click.Path(path_type=Path), default=ROOT / "params.yaml", help="The parameter file.")
@click.option("--page", type=click.Path(path_type=Path), default=ROOT / "docs" / "reproduction.md", help="The page.")
def main(preset: str, params: Path, page: Path) -> None:
    """Fill the table of PRESET."""
    try:
        table = make_table(config.load(params))
        page.write_text(put(page.read_text(encoding="utf-8"), preset, table), encoding="utf-8")
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    click.echo(table)


def make_table(project: Config) -> str:
    """Return a Markdown table of methods by partitions, for the sweep in params.yaml."""
    results = read_sweep(project)
    lines = [["method", *results.partitions], ["---"] * (1 + len(results.partitions))]
    for method in results.methods:
        cells = [accuracy.in_percent(results.accuracies(partition, method)) for partition in results.partitions]
        lines.append([method, *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    words = accuracy.in_words(project.params.train_fl.num_rounds, results.seeds)
    commits = {(run.settings.provenance["commit"] or "unknown")[:12] for run in results.all_runs}
    return f"{table}\n\n{words[0].upper()}{words[1:]}; commit {', '.join(sorted(commits))}."


def put(page: str, preset: str, table: str) -> str:
    """Return the page with `table` between the marks of `preset`."""
    start, end = f"<!-- {preset} -->\n", f"<!-- /{preset} -->"
    if start not in page or end not in page:
        raise PipelineError(f"The page has no marks {start.strip()} and {end}. Add them where the table belongs.")
    return page[: page.index(start) + len(start)] + table + "\n" + page[page.index(end) :]


if __name__ == "__main__":
    main()
