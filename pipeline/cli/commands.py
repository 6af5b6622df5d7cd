"""The command line: parse, check the configuration, run one stage.

A stage and its libraries are imported only inside its command, so that --help answers at once. Every key of a stage's
section in params.yaml is a flag of its command, made from the configuration's types; a flag overrides the key for one
run. Exit codes: 0 done, 1 a mistake or fault that is named in one line, 2 a wrong command line, 130 interrupted,
143 stopped by SIGTERM.
"""

import contextlib
import errno
import functools
import importlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import __version__
from pipeline.cli.features import features
from pipeline.errors import PipelineError
from pipeline.io.system_errors import in_words, remedy

if TYPE_CHECKING:
    from pipeline.settings.config import Config


class StageCommand(click.Command):
    """A command whose flags are the keys of one section of params.yaml; its function gets the checked `config`."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        """Remembers the section; its keys are read when help or flags are asked for."""
        super().__init__(*args, **kwargs)
        self._section = section

    @functools.cached_property
    def _flags(self) -> list[click.Option]:
        from pipeline.settings.error_messages import allowed
        from pipeline.settings.params import Params, Section

        model = Params.model_fields[self._section].annotation
        assert isinstance(model, type) and issubclass(model, Section)
        return [
            click.Option(
                [f"--{name.replace('_', '-')}", f"key_{name}"],
                metavar="VALUE",
                help=f"{field.description}.  [{allowed(field)}]",
            )
            for name, field in model.model_fields.items()
        ]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own options, a flag for each key, and --set for any other key."""
        *own, help_option = super().get_params(ctx)
        return [*own, *self._flags, _SET, help_option]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Says how values are written."""
        super().format_epilog(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(
            "A VALUE is written as in params.yaml, and a list in quotes: '[A, B]' or '[0.5, 1]'. Any key of another "
            "section: --set sweep.seeds='[0, 1]'."
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Checks the configuration and calls the command."""
        from pipeline.settings import config

        importlib.import_module("stages.train_fl.methods")  # registers the methods' settings
        overrides = {}
        for option in self._flags:
            assert option.name
            text = ctx.params.pop(option.name)
            if text is not None:
                key = f"{self._section}.{option.name.removeprefix('key_')}"
                overrides[key] = config.parse_value(key, text)
        for assignment in ctx.params.pop("assignments"):
            key, equals, text = assignment.partition("=")
            if not (key and equals):
                raise click.BadParameter(f"{assignment!r} is not KEY=VALUE", param_hint="--set")
            overrides[key] = config.parse_value(key, text)
        ctx.params["config"] = config.load(ctx.obj, overrides)
        return super().invoke(ctx)


_SET = click.Option(
    ["--set", "assignments"], multiple=True, metavar="KEY=VALUE", help="Override any key, dotted; repeatable."
)


class _Main(click.Group):
    """Turns errors that users can act on into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        with _one_line_errors(ctx):
            return super().invoke(ctx)


class _Terminated(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def _one_line_errors(ctx: click.Context) -> Iterator[None]:
    try:
        with _sigterm_ends_as_ctrl_c_does():
            yield
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    except (KeyboardInterrupt, _Terminated) as error:
        what, code = ("Stopped by SIGTERM", 143) if isinstance(error, _Terminated) else ("\nInterrupted", 130)
        then = _AFTER_INTERRUPT.get(
            ctx.invoked_subcommand or "", "run the same command again; it starts from the beginning"
        )
        click.echo(f"{what}: {then}.", err=True)
        raise click.exceptions.Exit(code) from None
    except MemoryError:
        raise click.ClickException(
            "Out of memory. Free some, or lower a batch size, and run again. What was finished before is kept."
        ) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # nobody reads the output any more: click ends silently
            raise
        what = f"{os.fsdecode(error.filename)}: {in_words(error)}" if error.filename else in_words(error)
        raise click.ClickException(f"{what}. {remedy(error.errno or 0)}. What was finished before is kept.") from None


_AFTER_INTERRUPT = dict.fromkeys(
    ("extract-features", "sweep-features", "synthesize", "train-fl", "preset"),
    "what was finished is kept, and the same command continues from there",
) | {"prepare-backbone": "files that were downloaded completely are kept; run the same command again"}


@contextlib.contextmanager
def _sigterm_ends_as_ctrl_c_does() -> Iterator[None]:
    """Unwinds the stack on SIGTERM, so that half-written files go; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="pipeline")
@click.option("--params", type=click.Path(path_type=Path), default="params.yaml", help="The parameter file.")
@click.option("--quiet", is_flag=True, help="Only warnings and errors.")
@click.pass_context
def main(ctx: click.Context, params: Path, quiet: bool) -> None:
    """FedDifRC in two stages: run the frozen diffusion model once, train federated from its cached features.

    \b
    Examples:
      pipeline prepare-data && pipeline prepare-backbone
      pipeline extract-features
      pipeline train-fl --method feddifrc --partition dir005 --seed 0
      pipeline report
    """
    ctx.obj = params
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", force=True)
    for library in ("httpx", "httpx2", "matplotlib", "PIL"):  # such as matplotlib's on its cache folder
        logging.getLogger(library).setLevel(logging.ERROR)


@main.command("prepare-data", cls=StageCommand, section="prepare_data")
def prepare_data(config: "Config") -> None:
    """Images -> data/datasets/<name>.

    \b
    Examples:
      pipeline prepare-data
      pipeline prepare-data --name cifar10 --source folder --path ~/cifar10 --train-subset 2000
      pipeline prepare-data --name office --source domain-folder --path ~/office_caltech_10 --image-size 224
      pipeline prepare-data --name tiny --source tiny-imagenet --path ~/tiny-imagenet-200 --broken-images skip
    """
    _report_path(_stage("prepare_data").run(config))


@main.command("prepare-backbone", cls=StageCommand, section="prepare_backbone")
@click.option("--train", is_flag=True, help="Train tiny-sd anew instead of using its shipped weights (40 minutes).")
def prepare_backbone(config: "Config", train: bool) -> None:
    """The frozen diffusion model -> models/<name>.

    \b
    Examples:
      pipeline prepare-backbone
      pipeline prepare-backbone --train
      pipeline prepare-backbone --name sd15 --source stable-diffusion-v1-5/stable-diffusion-v1-5 --revision COMMIT
    """
    _report_path(_stage("prepare_backbone").run(config, train=train))


@main.command("extract-features", cls=StageCommand, section="extract_features")
@click.option("--shard-range", metavar="A:B", help="Compute shards A to B - 1 only, as one job of a batch queue.")
@click.option("--overwrite", is_flag=True, help="Replace a finished set that other settings or data gave.")
@click.option("--dry-run", is_flag=True, help="Print what it would cost, after timing a few batches; write nothing.")
def extract_features(config: "Config", shard_range: str | None, overwrite: bool, dry_run: bool) -> None:
    """Stage 1: the frozen model, run once per image and prompt -> data/features/<set>. Resumes if killed.

    \b
    Examples:
      pipeline extract-features --dry-run
      pipeline extract-features --timestep 100 --set runtime.device=cuda
      accelerate launch --num_processes 8 -m pipeline extract-features
      pipeline extract-features --shard-range 0:4
    """
    if dry_run:
        click.echo("\n".join(_stage("extract_features").estimate(config).lines()))
    else:
        _report_path(_stage("extract_features").run(config, shard_range, overwrite))


@main.command("analyze-features", cls=StageCommand, section="analyze_features")
def analyze_features(config: "Config") -> None:
    """What the cached features hold, per layer: linear probe, clusters, t-SNE, prompts -> analysis/.

    \b
    Example:
      pipeline analyze-features
    """
    _report_path(_stage("analyze_features").run(config))


@main.command("sweep-features", cls=StageCommand, section="sweep_features")
@click.option("--dry-run", is_flag=True, help="Print how many passes it would be, and what is done; write nothing.")
def sweep_features(config: "Config", dry_run: bool) -> None:
    """Every timestep and layer on a sample of images, and which to take -> analysis/sweep. Resumes if killed.

    \b
    Examples:
      pipeline sweep-features --dry-run
      pipeline sweep-features --timesteps "[100, 200, 300]" --images 500 --margin-images 100
      pipeline preset analysis/sweep/recommended.yaml
    """
    if dry_run:
        click.echo("\n".join(_stage("analyze_features.sweep.plan").make(config).lines()))
    else:
        _report_path(_stage("analyze_features.sweep").run(config))


@main.command("synthesize", cls=StageCommand, section="synthesize")
def synthesize(config: "Config") -> None:
    """Images of every class, generated by the frozen model -> data/datasets/<name>-synthetic. Resumes if killed.

    \b
    Examples:
      pipeline synthesize --images-per-class 100
      pipeline train-fl --method fedavg --partition dir005 --seed 0 --balance-with-synthetic mean
    """
    _report_path(_stage("synthesize").run(config))


@main.command("train-fl", cls=StageCommand, section="train_fl")
@click.option("--method", required=True, help="A name under methods: in params.yaml.")
@click.option("--partition", required=True, help="A name under partitions: in params.yaml.")
@click.option(
    "--seed",
    "seeds",
    required=True,
    multiple=True,
    type=click.IntRange(min=0, max=2**63 - 1),
    help="Seed of everything random in a run; repeat it for several runs.",
)
@click.option("--overwrite", is_flag=True, help="Replace a finished run that other settings or data gave.")
def train_fl(config: "Config", method: str, partition: str, seeds: tuple[int, ...], overwrite: bool) -> None:
    """Stage 2: one federated run a seed from images and cached features -> results/<run>. Resumes if killed.

    \b
    Examples:
      pipeline train-fl --method fedavg --partition dir05 --seed 0 --seed 1 --seed 2
      pipeline train-fl --method feddifrc --partition dir005 --seed 1 --evaluate-on validation
      pipeline train-fl --method feddifrc --partition dir005 --seed 1 --set methods.feddifrc.temperature=0.1
    """
    for seed in dict.fromkeys(seeds):
        _report_path(_stage("train_fl").run(config, method, partition, seed, overwrite))


@main.command("report", cls=StageCommand, section="report")
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "markdown", "latex"]),
    default="html",
    show_default=True,
    help="html writes the page; the others print the tables.",
)
@click.option("--experiments", is_flag=True, help="Add a table of the project's DVC experiments.")
@click.option("--sweep", "with_sweep", is_flag=True, help="Show on the page what sweep-features found.")
def report(config: "Config", form: str, experiments: bool, with_sweep: bool) -> None:
    """Results of the sweep -> report/index.html, one self-contained page; or its tables on the standard output.

    \b
    Examples:
      pipeline report --title "FedDifRC on CIFAR-10"
      pipeline report --format latex > tables.tex
      pipeline report --experiments --sweep
    """
    if form == "html":
        _report_path(_stage("report").run(config, experiments, with_sweep))
    else:
        click.echo(_stage("report").as_text(config, form, experiments), nl=False)


@main.command("preset")
@click.argument("name", required=False)
@click.option("--run", "run_it", is_flag=True, help="Run the pipeline after it: dvc repro, or its DVC experiments.")
@click.option("--force", is_flag=True, help="Replace also edits of the parameter file that git does not hold.")
@click.pass_obj
def preset(params: Path, name: str | None, run_it: bool, force: bool) -> None:
    """Merge presets/NAME.yaml, or a file of that form, into params.yaml; without NAME, list the presets.

    \b
    Examples:
      pipeline preset
      pipeline preset digits-table --run
      pipeline preset analysis/sweep/recommended.yaml
      git checkout params.yaml
    """
    import json

    from pipeline.settings import presets

    if name is None:
        for known, text in presets.describe(params.resolve().parent / "presets").items():
            click.echo(f"{known:24} {text}")
        return
    importlib.import_module("stages.train_fl.methods")  # registers the methods' settings
    applied = presets.apply(name, params.resolve(), force)
    for key, (old, new) in applied.changes.items():
        whole = "replaced" if old else "added"
        click.echo(f"{key}: {whole if isinstance(new, dict) else f'{json.dumps(old)} -> {json.dumps(new)}'}", err=True)
    _report_path(params)
    if not run_it:
        click.echo(f"next: pipeline preset {name} --run, or dvc repro; git checkout {params} goes back", err=True)
        return
    for changes in applied.experiments:
        _dvc(params.resolve().parent, changes)


main.add_command(features)


def _dvc(root: Path, changes: dict[str, Any]) -> None:
    """Runs the pipeline under DVC, with other values as an experiment; exits with its code if it fails."""
    import subprocess
    import sys

    sets = [word for key, value in changes.items() for word in ("--set-param", f"{key}={value}")]
    command = ["exp", "run", *sets] if sets else ["repro"]
    done = subprocess.run([sys.executable, "-m", "dvc", *command], cwd=root, check=False)
    if done.returncode:
        raise click.exceptions.Exit(done.returncode)


def _stage(name: str) -> Any:
    return importlib.import_module(f"stages.{name}")


def _report_path(path: Path) -> None:
    click.echo(path)
