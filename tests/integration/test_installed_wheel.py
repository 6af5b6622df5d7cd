"""An installed wheel makes a project in an empty folder and runs it, without the repository."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from pipeline import project
from pipeline.errors import PipelineError
from pipeline.io import atomic
from tests.conftest import REPOSITORY, invoke
from tests.integration import forked
from tests.integration.project import QUICK, copy_repository, git

SMALL = QUICK | {
    "train_fl.num_clients": 2,
    "train_fl.clients_per_round": 2,
    "train_fl.num_rounds": 1,
    "train_fl.local_epochs": 1,
    "sweep.methods": "[feddifrc]",
    "sweep.partitions": "[iid]",
    "sweep.seeds": "[0]",
}


def run(program, *arguments, cwd, **variables):
    done = subprocess.run(
        [str(program), *arguments], cwd=cwd, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built from the files that git tracks or would track."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_repository(source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    run(sys.executable, "-c", build, str(out), cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The bin folder of a fresh environment with the wheel; other libraries are those of the tests' environment."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, symlinks=True)
    bin_folder = root / "bin"
    site = Path(run(bin_folder / "python", "-c", "import site; print(site.getsitepackages()[0])", cwd=root).strip())
    # A .pth file adds the folder to the path, but not what its own .pth files add: the repository stays invisible.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["-m", "pip", "--python", str(bin_folder / "python"), "install", "--quiet", "--no-deps", "--no-index"]
    run(sys.executable, *install, "--force-reinstall", "--ignore-installed", str(wheel), cwd=root)
    return bin_folder


def test_wheel_has_the_projects_files_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        template = f"pipeline/{project.TEMPLATE}/"
        presets = [f"presets/{file.name}" for file in sorted((REPOSITORY / "presets").glob("*.yaml"))]
        expected = {f"{template}{name}": REPOSITORY / name for name in (*project.FILES, *presets)}
        assert {name for name in names if name.startswith(template)} == set(expected)
        for name, file in expected.items():
            assert archive.read(name) == file.read_bytes()
    assert {name.partition("/")[0] for name in names} == {"pipeline", "stages", "feddifrc-0.1.0.dist-info"}
    assert "stages/prepare_backbone/tiny-sd/model_index.json" in names


def test_installed_wheel_runs_a_project_outside_the_repository(environment, tmp_path):
    """From an empty folder: init, a preset, every setting small, the pipeline under DVC, and a stage by hand."""
    pipeline = environment / "pipeline"
    where = run(environment / "python", "-c", "import pipeline; print(pipeline.__file__)", cwd=tmp_path)
    assert where.startswith(str(environment.parent))
    said = run(pipeline, "init", "mine", cwd=tmp_path)
    assert said.splitlines()[0] == "mine" and "cd mine" in said
    root = tmp_path / "mine"
    (root / "presets").mkdir()
    sections = {}
    for key, value in SMALL.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"  {name}: {value}\n")
    text = "".join(f"{section}:\n{''.join(lines)}" for section, lines in sections.items())
    (root / "presets" / "small.yaml").write_text("# Small enough for a test.\nbase: digits\n" + text)
    assert "cifar10-table" in run(pipeline, "preset", cwd=root)
    # From here on `pipeline` is forked, so that the stages start quickly; it still runs the wheel's code.
    forked.write_programs(environment, "pipeline", site=Path(where).parents[1])
    # Not activated: PATH lacks the environment, and `preset --run` has to find it.
    command = ("-m", "pipeline", "preset", "small", "--run")
    said = run(environment / "python", *command, cwd=root, DVC_NO_ANALYTICS="1", DVC_SITE_CACHE_DIR=str(tmp_path))
    assert "train-fl@feddifrc-iid" in said
    assert (root / "report" / "index.html").is_file()
    run(pipeline, "train-fl", "--method", "fedprox", "--partition", "iid", "--seed", "1", cwd=root)
    assert (root / "results" / "fedprox-iid" / "s1" / "metrics.json").is_file()
    activated = os.pathsep.join([str(environment), os.environ["PATH"]])
    again = run(
        environment / "python", "-m", "dvc", "repro", cwd=root, PATH=activated, DVC_SITE_CACHE_DIR=str(tmp_path)
    )
    assert "up to date" in again


def test_init_leaves_nothing_if_it_fails(tmp_path, monkeypatch):
    write_bytes = atomic.write_bytes

    def full_disk(path, content):
        if path.name == "fl_curves.json":
            raise PipelineError("No space left on device")
        write_bytes(path, content)

    monkeypatch.setattr(atomic, "write_bytes", full_disk)
    with pytest.raises(PipelineError):
        project.create(tmp_path / "new" / "project")
    assert not list(tmp_path.iterdir())


def test_init_refuses_to_overwrite(tmp_path):
    (tmp_path / "params.yaml").write_text("mine\n")
    (tmp_path / ".gitignore").write_text("mine\n")
    result = invoke(tmp_path, "init", str(tmp_path))
    assert result.exit_code == 1
    assert f"{tmp_path} already has params.yaml, .gitignore. Choose another folder" in result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == [".gitignore", "params.yaml"]
    assert (tmp_path / "params.yaml").read_text() == "mine\n"


@pytest.mark.parametrize("in_git", [False, True])
def test_init_sets_dvc_up_for_the_folder(tmp_path, in_git):
    if in_git:
        git(tmp_path, "init", "--quiet")
    root = tmp_path / "below" / "project"
    assert invoke(tmp_path, "init", str(root)).exit_code == 0
    for name in project.FILES:
        assert name == ".dvc/config" or (root / name).read_bytes() == (REPOSITORY / name).read_bytes()
    assert ("no_scm = true" in (root / ".dvc" / "config").read_text()) == (not in_git)
    stages = run(sys.executable, "-m", "dvc", "stage", "list", "--name-only", cwd=root, DVC_NO_ANALYTICS="1")
    assert "prepare-data" in stages and "train-fl@feddifrc-dir005" in stages
