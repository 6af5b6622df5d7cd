"""The command line: one command per stage.

Stages are imported inside the commands, so that --help answers at once. Every key of a stage's section in params.yaml
is a flag of its command, generated from the types of the settings; a flag overrides the key for one run.

Exit codes:
    0: Success.
    1: An error, explained in one line.
    2: A wrong command line.
    130: Interrupted.
    143: Stopped by SIGTERM.
"""

import errno
import functools
import logging
import os
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import __version__, memory, project, threads
from pipeline.cli.features import features
from pipeline.errors import ConfigError, PipelineError
from pipeline.io.atomic import KEPT
from pipeline.io.system_errors import in_words, remedy
from pipeline.sigterm import Terminated, on_sigterm

if TYPE_CHECKING:
    from pipeline.settings.config import Config


_STARTED = time.perf_counter()  # for estimates, which count the time of the imports
_DOT = "__"  # of a key, in the name of a flag's variable


def _described(field: Any) -> str:
    """Return the description of a key, the values that it may have, and its default."""
    from pipeline.settings.error_messages import allowed

    default = "" if field.is_required() else f"; default {'null' if field.default is None else field.default}"
    return f"{field.description}.  [{allowed(field)}{default}]"


class StageCommand(click.Command):
    """A command whose flags are the keys of one section of params.yaml; its function receives the checked `config`."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        """Store the section's name."""
        super().__init__(*args, **kwargs)
        self._section = section

    @functools.cached_property
    def _flags(self) -> list[click.Option]:
        from pipeline.settings.error_messages import inner_sections
        from pipeline.settings.params import Params, Section

        model = Params.model_fields[self._section].annotation
        assert isinstance(model, type) and issubclass(model, Section)
        inner = inner_sections(model)
        fields = {name: field for name, field in model.model_fields.items() if name not in inner}
        for section, models in inner.items():
            fields |= {f"{section}.{name}": field for found in models for name, field in found.model_fields.items()}
        flags = []
        for key, field in fields.items():
            names = [f"--{key.replace('_', '-').replace('.', '-')}", f"key_{key.replace('.', _DOT)}"]
            flags.append(click.Option(names, metavar="VALUE", help=_described(field)))
        return flags

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own options, a flag per key, and --set for any other key."""
        *own, help_option = super().get_params(ctx)
        return [*own, *self._flags, _SET, help_option]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Explain how values are written."""
        super().format_epilog(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(
            "Write a VALUE as in params.yaml, and a list in quotes: '[A, B]' or '[0.5, 1]'. For a key of another "
            "section use --set, for example --set sweep.seeds='[0, 1]'."
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Check the configuration and call the command."""
        import stages.train_fl.methods  # noqa: F401  # registers the settings of every method
        from pipeline.settings import config

        overrides = {}
        for name in [name for name in ctx.params if name.startswith("key_")]:
            if (text := ctx.params.pop(name)) is not None:
                key = f"{self._section}.{name.removeprefix('key_').replace(_DOT, '.')}"
                overrides[key] = config.parse_value(key, text)
        try:
            overrides |= config.parse_overrides(ctx.params.pop("assignments"))
        except ConfigError as error:
            raise click.BadParameter(str(error), param_hint="--set") from None
        ctx.params["config"] = config.load(ctx.obj, overrides)
        return super().invoke(ctx)


_SET_HELP = "Override any key, such as sweep.seeds; repeatable."
_SET = click.Option(["--set", "assignments"], multiple=True, metavar="KEY=VALUE", help=_SET_HELP)


class _Main(click.Group):
    """Print errors that users can act on as one line, and set the exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with on_sigterm(_terminate):
                return super().invoke(ctx)
        except PipelineError as error:
            raise click.ClickException(str(error)) from None
        except (KeyboardInterrupt, Terminated) as error:
            what, code = ("Stopped by SIGTERM", 143) if isinstance(error, Terminated) else ("\nInterrupted", 130)
            resumes = ctx.invoked_subcommand in _RESUMING or KEPT in getattr(error, "__notes__", ())
            click.echo(f"{what}: {KEPT if resumes else 'run the command again to start over'}.", err=True)
            raise click.exceptions.Exit(code) from None
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's, of a GPU
                raise
            where = "memory" if isinstance(error, MemoryError) else "GPU memory"
            smaller = "a batch size" if isinstance(error, MemoryError) else "a batch size or runtime.workers"
            advice = f"Completed work is kept; free some memory or lower {smaller}, and run again."
            raise click.ClickException(f"Out of {where}. {advice}") from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of the output is gone; click exits silently
                raise
            what = f"{os.fsdecode(error.filename)}: {in_words(error)}" if error.filename else in_words(error)
            raise click.ClickException(f"{what}. Completed work is kept. {remedy(error.errno or 0)}.") from None


_RESUMING = ("prepare-backbone", "extract-features", "sweep-features", "synthesize", "train-fl", "preset")
"""Commands that resume whenever they were interrupted."""


def _terminate() -> None:
    """Unwind the stack, so that partial files are removed."""
    raise Terminated


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="pipeline")
@click.option("--params", type=click.Path(path_type=Path), default="params.yaml", help="The project's parameter file.")
@click.option("--quiet", is_flag=True, help="Show only warnings and errors.")
@click.pass_context
def main(ctx: click.Context, params: Path, quiet: bool) -> None:
    """FedDifRC in two stages: run a frozen diffusion model once, then train federated models from its cached features.

    \b
    Examples:
      pipeline init my-project && cd my-project
      pipeline prepare-data && pipeline prepare-backbone
      pipeline extract-features
      pipeline train-fl --method feddifrc --partition dir005 --seed 0
      pipeline report
    """
    threads.sleep_while_waiting()
    memory.keep_freed()
    ctx.obj = params
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", force=True)
    for library in ("httpx", "httpx2", "matplotlib", "PIL"):  # their warnings mean nothing to users
        logging.getLogger(library).setLevel(logging.ERROR)


@main.command("init")
@click.argument("folder", type=click.Path(path_type=Path), default=".")
def init(folder: Path) -> None:
    """Make a project in FOLDER, by default the working folder: params.yaml, dvc.yaml, .dvc/, .gitignore and data/.

    \b
    Examples:
      pipeline init my-project
      pipeline init
    """
    project.create(folder)
    click.echo(folder)
    enter = "" if folder.resolve() == Path.cwd() else f"cd {shlex.quote(str(folder))}, then "
    click.echo(
        f"next: {enter}edit params.yaml or choose a preset (`pipeline preset`), and run `dvc repro`, or stage by stage "
        "`pipeline prepare-data`, `pipeline prepare-backbone`, `pipeline extract-features`, ...",
        err=True,
    )


@main.command("prepare-data", cls=StageCommand, section="prepare_data")
def prepare_data(config: "Config") -> None:
    """Prepare a data set: images -> data/datasets/<name>.

    \b
    Examples:
      pipeline prepare-data
      pipeline prepare-data --name cifar10 --source folder --path ~/cifar10 --train-subset 2000
      pipeline prepare-data --name office --source domain-folder --path ~/office_caltech_10 --image-size 224
      pipeline prepare-data --name imagenet --source webdataset --path 'imagenet-{train,val}-{000..127}.tar'
      pipeline prepare-data --name cifar --source hf-dataset --path uoft-cs/cifar10@<commit>
      pipeline prepare-data --name tiny --source tiny-imagenet --path ~/tiny-imagenet-200 --broken-images skip
    """
    from stages import prepare_data as stage

    click.echo(stage.run(config))


@main.command("prepare-backbone", cls=StageCommand, section="prepare_backbone")
@click.option("--train", is_flag=True, help="Train tiny-sd instead of using its shipped weights: 40 minutes on a CPU.")
def prepare_backbone(config: "Config", train: bool) -> None:
    """Prepare the frozen diffusion model -> models/<name>.

    \b
    Examples:
      pipeline prepare-backbone
      pipeline prepare-backbone --train
      pipeline prepare-backbone --name mine --source train --corpus ~/public-x-rays --training-image-size 64
      pipeline prepare-backbone --name sd15 --source stable-diffusion-v1-5/stable-diffusion-v1-5 --revision COMMIT
    """
    from stages import prepare_backbone as stage

    click.echo(stage.run(config, train=train))


@main.command("extract-features", cls=StageCommand, section="extract_features")
@click.option("--shard-range", metavar="A:B", help="Compute only shards A to B - 1, as one job of a batch queue.")
@click.option("--overwrite", is_flag=True, help="Replace a finished set made from other settings or data.")
@click.option(
    "--dry-run", is_flag=True, help="Time a few batches; print the cost and what exists already. Write nothing."
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="With --dry-run: the number of processes to plan for, each with a GPU or a machine of its own.",
)
def extract_features(
    config: "Config", shard_range: str | None, overwrite: bool, dry_run: bool, processes: int | None
) -> None:
    """Stage 1: run the frozen model once per image and prompt -> data/features/<set>. Resumes if interrupted.

    \b
    Examples:
      pipeline extract-features --dry-run --processes 8
      pipeline extract-features --timestep 100 --set runtime.device=cuda
      accelerate launch --num_processes 8 -m pipeline extract-features
      pipeline extract-features --shard-range 0:4
    """
    from stages import extract_features as stage

    if dry_run and shard_range:
        raise click.UsageError("--dry-run plans the whole set. Leave out --shard-range; --processes plans for several.")
    if dry_run:
        click.echo("\n".join(stage.estimate(config, processes or 1, _STARTED, overwrite).lines()))
    elif processes:
        raise click.UsageError("--processes needs --dry-run. To start processes, use accelerate launch.")
    else:
        click.echo(stage.run(config, shard_range, overwrite))


@main.command("analyze-features", cls=StageCommand, section="analyze_features")
def analyze_features(config: "Config") -> None:
    """Analyze the cached features per layer: linear probe, clusters, t-SNE, prompts -> analysis/.

    \b
    Examples:
      pipeline analyze-features
      pipeline analyze-features --images 2000 --splits 5
    """
    from stages import analyze_features as stage

    click.echo(stage.run(config))


@main.command("sweep-features", cls=StageCommand, section="sweep_features")
@click.option("--dry-run", is_flag=True, help="Print the number of passes and how many are done; write nothing.")
def sweep_features(config: "Config", dry_run: bool) -> None:
    """Compare timesteps and layers on a sample and recommend a choice -> analysis/sweep. Resumes if interrupted.

    \b
    Examples:
      pipeline sweep-features --dry-run
      pipeline sweep-features --timesteps "[100, 200, 300]" --images 500 --margin-images 100
      pipeline preset analysis/sweep/recommended.yaml
    """
    from stages.analyze_features import sweep
    from stages.analyze_features.sweep import plan

    if dry_run:
        click.echo("\n".join(plan.make(config).lines()))
    else:
        click.echo(sweep.run(config))


@main.command("synthesize", cls=StageCommand, section="synthesize")
def synthesize(config: "Config") -> None:
    """Generate images of every class with the frozen model -> data/datasets/<name>-synthetic. Resumes if interrupted.

    \b
    Examples:
      pipeline synthesize --images-per-class 100
      pipeline train-fl --method fedavg --partition dir005 --seed 0 --balance-with-synthetic mean
    """
    from stages import synthesize as stage

    click.echo(stage.run(config))


_SEED_HELP = "Seed of a run's random numbers; repeat the option for several runs. Default: all of sweep.seeds."
_OVERWRITE_HELP = (
    "Replace a finished run made from other settings or data. To train an equal run again, delete its folder."
)


_ONE: dict[str, Any] = {"required": True, "multiple": True}  # a second one would silently replace the first


def _once(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> str:
    if len(values) > 1:
        raise click.UsageError(
            f"{param.opts[0]} is given {len(values)} times. Give it once per command; `dvc repro` trains the sweep."
        )
    return values[0]


def _describe_methods(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    """Print the keys of every method, and exit."""
    if not wanted or context.resilient_parsing:
        return
    import stages.train_fl.methods  # noqa: F401  # registers the settings of every method
    from pipeline.settings.params import METHODS, Guidance, Section

    models: dict[str, type[Section]] = {**METHODS, "guidance of any method, and keys of feddifrc": Guidance}
    listing = click.HelpFormatter()
    for name, model in models.items():
        shown_below = set(Guidance.model_fields) if Guidance in model.__mro__[1:] else set()
        hidden = {"algorithm", "guidance", *shown_below}
        keys = {key: field for key, field in model.model_fields.items() if key not in hidden}
        with listing.section(name):
            if keys:
                listing.write_dl([(key, _described(field)) for key, field in keys.items()])
            else:
                listing.write_text("no keys of its own")
    click.echo(listing.getvalue(), nl=False)
    context.exit()


@main.command("train-fl", cls=StageCommand, section="train_fl")
@click.option(
    "--list-methods",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_describe_methods,
    help="Describe the keys of every method and of its guidance (`methods` in params.yaml), and exit.",
)
@click.option("--method", callback=_once, **_ONE, help="Name of an entry under methods in params.yaml.")
@click.option("--partition", callback=_once, **_ONE, help="Name of an entry under partitions in params.yaml.")
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(0, 2**63 - 1), help=_SEED_HELP)
@click.option("--overwrite", is_flag=True, help=_OVERWRITE_HELP)
@click.option(
    "--dry-run", is_flag=True, help="Time a few batches; print what a run does, costs and finds. Write nothing."
)
def train_fl(
    config: "Config", method: str, partition: str, seeds: tuple[int, ...], overwrite: bool, dry_run: bool
) -> None:
    """Stage 2: train from images and cached features -> results/<method>-<partition>/s<seed>. Resumes if interrupted.

    Finished runs of the same settings and data are kept.

    \b
    Examples:
      pipeline train-fl --method fedavg --partition dir05 --seed 0 --dry-run
      pipeline train-fl --method fedavg --partition dir05
      pipeline train-fl --method fedavg --partition dir05 --seed 0 --seed 1 --seed 2
      pipeline train-fl --method feddifrc --partition dir005 --seed 1 --evaluate-on validation
      pipeline train-fl --method feddifrc --partition dir005 --seed 1 --set methods.feddifrc.temperature=0.1
    """
    from stages import train_fl as stage

    chosen = list(dict.fromkeys(seeds or config.params.sweep.seeds))
    if dry_run:
        started: float | None = _STARTED
        estimates = []
        for seed in chosen:
            estimates.append(stage.estimate(config, method, partition, seed, started, overwrite))
            click.echo("\n".join([*estimates[-1].lines(), *([""] if len(chosen) > 1 else [])]))
            started = None  # the next run has nothing left to import
        if len(chosen) > 1:
            click.echo(stage.total(estimates))
        return
    for seed in chosen:
        click.echo(stage.run(config, method, partition, seed, overwrite))


_FORMATS = click.Choice(["html", "markdown", "latex"])
_FORMAT_HELP = "html writes the page; the others print its tables."


@main.command("report", cls=StageCommand, section="report")
@click.option("--format", "form", type=_FORMATS, default="html", show_default=True, help=_FORMAT_HELP)
@click.option("--experiments", is_flag=True, help="Add a table of the project's DVC experiments.")
@click.option("--sweep", "with_sweep", is_flag=True, help="Add the results of sweep-features to the page.")
def report(config: "Config", form: str, experiments: bool, with_sweep: bool) -> None:
    """Report the results of the sweep -> report/index.html, one self-contained page; or print its tables.

    \b
    Examples:
      pipeline report --title "FedDifRC on CIFAR-10"
      pipeline report --format latex > tables.tex
      pipeline report --experiments --sweep
    """
    from stages import report as stage

    if form == "html":
        click.echo(stage.run(config, experiments, with_sweep))
    else:
        click.echo(stage.as_text(config, form, experiments), nl=False)


@main.command("preset")
@click.argument("name", required=False)
@click.option("--run", "run_it", is_flag=True, help="Then run dvc repro, or the preset's DVC experiments.")
@click.option("--dry-run", is_flag=True, help="Print the changes and the number of federated runs, and stop.")
@click.option("--force", is_flag=True, help="Overwrite edits of the parameter file that git does not have.")
@click.pass_obj
def preset(params: Path, name: str | None, run_it: bool, dry_run: bool, force: bool) -> None:
    """Merge a preset into params.yaml; without NAME, list the presets.

    NAME is a file in the project's presets/, a preset of the program, or the path of a file that ends in .yaml.

    \b
    Examples:
      pipeline preset
      pipeline preset digits-table --dry-run
      pipeline preset digits-table --run
      pipeline preset analysis/sweep/recommended.yaml
    """
    import json

    from pipeline.settings import config, presets

    if name is None:
        listing = click.HelpFormatter()
        listing.write_dl(list(presets.describe(params.resolve().parent / "presets").items()))
        click.echo(listing.getvalue(), nl=False)
        return
    import stages.train_fl.methods  # noqa: F401  # registers the settings of every method

    merge = presets.merge(name, params.resolve())
    if run_it and any(merge.experiments) and not dry_run:
        _check_git(params.resolve().parent, name)
    undo = None if dry_run else merge.write(force)
    for key, (old, new) in merge.changes.items():
        entry = "replaced" if old else "added"
        click.echo(f"{key}: {entry if isinstance(new, dict) else f'{json.dumps(old)} -> {json.dumps(new)}'}", err=True)
    several = f" in {len(merge.experiments)} experiments" if len(merge.experiments) > 1 else ""
    click.echo(f"federated runs: {merge.runs}{several}", err=True)
    if dry_run:
        if edits := merge.edits_lost():
            click.echo(f"{merge.refusal(edits)} Without --dry-run, it needs --force.", err=True)
        return
    click.echo(params)
    if undo:
        click.echo(f"to undo: {undo}", err=True)
    if not run_it:
        click.echo(f"next: dvc repro, or pipeline preset {name} --run", err=True)
    for words in presets.overrides(merge.experiments, config.read_yaml(params)) if run_it else []:
        _dvc(params.resolve().parent, words)


main.add_command(features)


def _check_git(root: Path, name: str) -> None:
    """Refuse DVC experiments, which are commits, where DVC cannot make them."""
    import subprocess

    try:
        words = ["git", "rev-parse", "--verify", "HEAD"]
        answer = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
        error = answer.stderr.strip().partition("\n")[0] if answer.returncode else ""
    except OSError:
        error = "git is not installed"
    folder = next((folder for folder in (root, *root.parents) if (folder / ".dvc").is_dir()), root)
    files = [file for file in (folder / ".dvc" / "config", folder / ".dvc" / "config.local") if file.exists()]
    needed = f"Preset {name} runs DVC experiments, which need a git repository with a commit"
    if error:
        raise ConfigError(f"{needed}, and {root} is in none ({error}). Run `git init` and commit the project first.")
    if any(re.search(r"^\s*no_scm\s*=\s*true", file.read_text(encoding="utf-8"), re.MULTILINE) for file in files):
        raise ConfigError(f"{needed}, and DVC is set to use none. Run `dvc config --unset core.no_scm` first.")


def _dvc(root: Path, overrides: list[str]) -> None:
    """Run the pipeline with DVC, as an experiment if values change; exit with DVC's code if it fails."""
    import subprocess
    import sys

    sets = [word for override in overrides for word in ("--set-param", override)]
    command = ["exp", "run", *sets] if sets else ["repro"]
    # dvc.yaml runs `pipeline` from the PATH, which lacks this environment if it is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    code = subprocess.call([sys.executable, "-m", "dvc", *command], cwd=root, env=os.environ | {"PATH": path})
    if code:
        raise click.exceptions.Exit(code)
