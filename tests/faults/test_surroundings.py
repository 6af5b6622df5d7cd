"""Clocks, locales and file names do not change results: the bytes are equal, or one line says why not."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.faults import program
from tests.faults.program import DATA, EXTRACT, SET, TRAIN
from tests.faults.test_kills import begin, finished


def in_python_of_its_own(root, *commands, before="", **environment):
    """Run the program's commands in a new interpreter, with the encoding and locale of the environment."""
    code = (
        f"import json, sys\nimport locale\n{before}\nfrom pipeline.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try:\n        main(arguments, prog_name='pipeline')\n"
        "    except SystemExit as end:\n        if end.code:\n            raise\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], cwd=root, env=kept | program.ENVIRONMENT | environment,
        capture_output=True, timeout=program.TIMEOUT,
    )  # fmt: skip


@pytest.fixture
def foreign_locales(tmp_path):
    """A folder with German (decimal comma) and Turkish (dotless i) locales, compiled from the system's sources."""
    if not shutil.which("localedef"):
        pytest.skip("localedef is not installed")
    for name in ("de_DE", "tr_TR"):
        made = subprocess.run(
            ["localedef", "-i", name, "-f", "UTF-8", tmp_path / f"{name}.UTF-8"], capture_output=True, text=True
        )
        if not (tmp_path / f"{name}.UTF-8").exists():
            pytest.skip(f"locale {name} cannot be compiled: {made.stderr}")
    return tmp_path


@pytest.mark.faults
@pytest.mark.parametrize("language", ["de_DE.UTF-8", "tr_TR.UTF-8"])
def test_results_do_not_depend_on_the_locale(made, project, foreign_locales, trial, language):
    begin(project, "train-fl")
    before = "locale.setlocale(locale.LC_ALL, '')\nassert 'C' != locale.setlocale(locale.LC_NUMERIC)"
    with trial("other locale or encoding") as tried:
        done = in_python_of_its_own(project, TRAIN, before=before, LC_ALL=language, LOCPATH=str(foreign_locales))
        assert done.returncode == 0, done.stderr.decode()
        tried.compare(finished(made.root, "train-fl"), finished(project, "train-fl"))
        done = in_python_of_its_own(project, ("report",), before=before, LC_ALL=language, LOCPATH=str(foreign_locales))
        assert done.returncode == 0, done.stderr.decode()


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.fixture
def abroad(made, tmp_path):
    """The project in a path with spaces and umlauts."""
    root = tmp_path / "Föderiertes Lernen – “été”"
    shutil.copytree(made.root, root, ignore=shutil.ignore_patterns("models"))
    (root / "models").symlink_to(made.root / "models")
    return root


def images(root, names):
    """Write a tree of class folders with ten images each."""
    rng = np.random.default_rng(0)
    for name in names:
        folder = os.path.join(os.fsencode(root), b"data/raw/folder", name if isinstance(name, bytes) else name.encode())
        os.makedirs(folder)
        for number in range(10):
            with open(os.path.join(folder, b"%d.png" % number), "wb") as stream:
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(stream, "PNG")


@pytest.mark.parametrize("environment", [pytest.param({}, marks=pytest.mark.faults), ASCII], ids=["UTF-8", "ASCII"])
def test_non_ascii_names_are_supported(abroad, trial, environment):
    images(abroad, ["Käfer", "猫", "naïve café"])
    changed = ("prepare_data.name=own", "prepare_data.source=folder", "prepare_data.train_subset=null")
    settings = [argument for change in changed for argument in ("--set", change)]
    with trial("names that are not ASCII"):
        commands = [(*words, *settings) for words in (("prepare-data",), EXTRACT, (*TRAIN, "--overwrite"))]
        done = in_python_of_its_own(abroad, *commands, **environment)
        assert done.returncode == 0, done.stderr.decode()
        assert b"Logging error" not in done.stderr and b"Traceback" not in done.stderr
        manifest = (abroad / "data/datasets/own/manifest.json").read_text(encoding="utf-8")
        assert "Käfer" in manifest and "猫" in manifest and "naïve café" in manifest


def test_class_folder_without_a_utf8_name_is_rejected(project, trial):
    images(project, ["cat", b"d\xf6g"])
    settings = ("--name", "own", "--source", "folder", "--set", "prepare_data.train_subset=null")
    with trial("names that are not ASCII") as tried:
        before = program.contents(project / "data" / "datasets")
        program.refuse(project, "prepare-data", *settings, says=["name is not UTF-8", "Rename the folder"])
        tried.compare(before, program.contents(project / "data" / "datasets"))
        (bad,) = (entry for entry in os.listdir(os.fsencode(project) + b"/data/raw/folder") if b"\xf6" in entry)
        folder = os.fsencode(project) + b"/data/raw/folder/"
        os.rename(folder + bad, folder + b"dog")
        program.succeed(project, "prepare-data", *settings)


@pytest.mark.parametrize("years", [-50, 12], ids=["past", "future"])
def test_results_do_not_depend_on_file_times_or_time_zone(made, project, trial, years):
    """The clock was wrong when the files were written, and the time zone is another one now."""
    then = time.time() + years * 365.25 * 86400
    with trial("clock set back or forward") as tried:
        program.run(project, *EXTRACT, "--timestep", "100", "--shard-range", "0:2")
        for file in project.rglob("*"):
            os.utime(file, (then, then), follow_symlinks=False)
        program.unfinish_run(project)
        under = program.Conditions(environment={"TZ": "Pacific/Kiritimati"})
        assert "complete already" in program.succeed(project, *EXTRACT, under=under)
        program.succeed(project, *TRAIN, under=under)
        tried.compare(program.contents(made.root / SET), program.contents(project / SET))
        tried.compare(program.contents(made.root / DATA), program.contents(project / DATA))
        tried.compare(finished(made.root, "train-fl"), finished(project, "train-fl"))
        assert "resuming: 2 of 6" in program.succeed(project, *EXTRACT, "--timestep", "100", under=under)
