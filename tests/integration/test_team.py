"""The commands of docs/sharing.md, run as printed: three members with real repositories, storages and DVC.

Each section's commands run as one script; a line `# params.yaml: key: value` sets the key, and
`# dvc.yaml: without NAME` deletes a stage. The log says how many passes of the frozen model an extraction took.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pipeline import project as project_template
from pipeline.feature_store import FeatureSet
from tests.conftest import REPOSITORY, invoke, write_params
from tests.integration.project import QUICK, copy_tracked

BIN = Path(sys.executable).parent
SET = Path("data") / "features" / "digits-tiny-sd-t300"
GIT = {f"GIT_{who}_{what}": "member@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
SMALL = QUICK | {
    "extract_features.rows_per_shard": 25,
    "train_fl.num_rounds": 1,
    "sweep.methods": ["feddifrc"],
    "sweep.partitions": ["dir05"],
    "sweep.seeds": [0],
}
RUN = ("train-fl", "--method", "feddifrc", "--partition", "dir05", "--seed", "0")
EDIT = """
import sys
from ruamel.yaml import YAML
yaml = YAML()
file, key, value = sys.argv[1:]
content = yaml.load(open(file))
if key == "without":
    del content["stages"][value]
else:
    section, key = key.split(".")
    content[section][key] = YAML(typ="safe").load(value)
yaml.dump(content, open(file, "w"))
"""


@dataclass(frozen=True)
class Team:
    """The team's folder, with its repository, storage and members' homes, and where its `pipeline` is."""

    root: Path
    bin_folder: Path
    outputs: dict[Path, str] = field(default_factory=dict)

    def member(self, name: str) -> Path:
        """Make and return a member's home."""
        home = self.root / name
        home.mkdir(exist_ok=True)
        return home

    def shell(self, home: Path, script: str, **environment: str) -> str:
        """Run a script, which must succeed, and return its output."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_", "AWS_"))}
        own = {"DVC_SITE_CACHE_DIR": str(self.root / "site"), "DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull}
        path = os.pathsep.join([str(self.bin_folder), str(BIN), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=home, text=True, capture_output=True,
            env=inherited | own | GIT | {"PATH": path} | environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        self.outputs[home] = self.outputs.get(home, "") + done.stdout + done.stderr
        return done.stdout + done.stderr

    def passes(self, home: Path) -> int:
        """Return how many passes of the frozen model the commands of a member have logged."""
        return sum(map(int, re.findall(r"\d+ images, (\d+) passes in", self.outputs[home])))

    def section(self, title: str, home: Path, port: int = 9000, **environment: str) -> str:
        """Run the commands of a section of the page, and return their output."""
        edit = f"{sys.executable} {self.root / 'edit.py'}"
        script = re.sub(r"# ((?:params|dvc)\.yaml): ([\w.]+):? (.*)", rf"{edit} \1 \2 '\3'", SECTIONS[title])
        places = {"git@host:team/feddifrc.git": self.root / "hub.git", ":9000": f":{port}"}
        places |= {f"/srv/{name}": self.root / name for name in ("team", "cache")}
        for example, real in places.items():
            script = script.replace(example, str(real))
        return self.shell(home, script, **environment)


def sections() -> dict[str, str]:
    """Return title -> commands of each section."""
    found: dict[str, str] = {}
    for part in (REPOSITORY / "docs" / "sharing.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        found[title] = "\n".join(line.strip() for line in text.splitlines() if line.startswith("    "))
    return found


SECTIONS = sections()


def ran(output: str) -> set[str]:
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def project_files(into: Path) -> None:
    """Write the files of a small project, as in git."""
    copy_tracked(into)
    write_params(into, SMALL)


PASSES_PER_SET = 60 * 3  # 60 images, each with "", its prompt and one other; those of the basis are not counted


@pytest.fixture(scope="module")
def team(tmp_path_factory, quick_bin) -> Team:
    """The team's repository and storage, after A has extracted and pushed."""
    team = Team(tmp_path_factory.mktemp("team"), quick_bin)
    (team.root / "edit.py").write_text(EDIT)
    first = team.member("first")
    project_files(first)
    team.shell(team.root, "git init -q --bare -b main hub.git")
    team.shell(first, "git init -q -b main; git add -A; git commit -qm start; git push -q ../hub.git main")
    a = team.member("a")
    team.section("The storage, once", a)
    output = team.section("A: extract and push", a)
    assert ran(output) >= {"extract-features", "train-fl@feddifrc-dir05", "report"}
    assert team.passes(a) == PASSES_PER_SET
    return team


def test_b_trains_without_passes_of_the_model_and_a_takes_over_the_run(team):
    b = team.member("b")
    output = team.section("B: train without the model", b)
    mine, hers = b / "feddifrc", team.root / "a" / "feddifrc"
    assert ran(output) == {"prepare-data", "train-fl@feddifrc-dir05"}
    assert "feddifrc-dir05-s0 is complete already" in output  # A's run
    assert "Stage 'extract-features' didn't change" in output
    assert "Pulling data for stage: 'prepare-data'" not in output  # the images are B's own
    assert team.passes(b) == 0
    assert not (mine / "models").exists()
    assert contents(mine / SET) == contents(hers / SET)
    metrics = mine / "results" / "feddifrc-dir05" / "s3" / "metrics.json"
    assert metrics.exists()

    team.section("B shares the run", b)
    output = team.section("A takes over B's run", team.root / "a")
    assert ran(output) == set() and "Stage 'train-fl@feddifrc-dir05' didn't change" in output
    assert (hers / metrics.relative_to(mine)).read_bytes() == metrics.read_bytes()  # with B's seconds


def test_c_extracts_only_the_new_timestep(team):
    c = team.member("c")
    output = team.section("C: another timestep", c)
    project = c / "feddifrc"
    assert ran(output) == {"extract-features"}
    new = SET.with_name("digits-tiny-sd-t200")
    assert team.passes(c) == PASSES_PER_SET
    assert contents(project / SET) == contents(team.root / "a" / "feddifrc" / SET)
    # anyone can pull both sets without passes
    other = team.member("other")
    script = f"git clone -q {team.root}/hub.git p && cd p && dvc pull {SET} && git checkout -q timestep-200"
    team.shell(other, f"{script} && dvc pull {new}")
    assert contents(other / "p" / SET) == contents(project / SET)
    assert contents(other / "p" / new) == contents(project / new)
    assert team.passes(other) == 0


def test_training_on_some_shards_names_the_missing_ones_and_how_to_pull_them(team, monkeypatch):
    home = team.member("some")
    team.section("Some shards only", home)
    project = home / "feddifrc"
    assert sorted(contents(project / SET)) == ["basis.h5", "manifest.json", "shard-00001.h5"]
    FeatureSet(project / SET, partial=True).read(np.arange(25, 50))
    monkeypatch.chdir(project)
    refused = invoke(project, *RUN)
    assert refused.exit_code == 1 and len(refused.output.strip().splitlines()) == 1
    assert "lacks shard-00000.h5, shard-00002.h5 of the 3 shards" in refused.output
    team.shell(project, re.search(r"`(dvc pull [^`]*)`", refused.output)[1])
    assert invoke(project, *RUN).exit_code == 0
    assert (project / "results" / "feddifrc-dir05" / "s0" / "metrics.json").exists()
    assert team.passes(home) == 0


@pytest.mark.parametrize("title", ["From another repository", "From another repository, tracked"])
def test_trains_on_a_set_from_another_repository(team, title):
    home = team.member(title.replace(" ", "_"))
    project_files(home)
    team.shell(home, "git init -q -b main; git add -A; git commit -qm ours")
    team.section(title, home)
    assert (home / "results" / "feddifrc-dir05" / "s0" / "metrics.json").exists()
    assert not (home / "models").exists() and team.passes(home) == 0
    tracked = set(team.shell(home, "git ls-files data").split()) - set(project_template.FILES)
    assert tracked == ({f"{SET}.dvc"} if title.endswith("tracked") else set())


def test_dvc_does_not_extract_again_a_set_imported_from_a_tar(team):
    hers, home = team.root / "a" / "feddifrc", team.member("tar")
    project_files(home)
    team.shell(home, "git init -q -b main; git add -A; git commit -qm ours")
    assert invoke(hers, "features", "export", SET.name, "-o", str(home / "received.tar")).exit_code == 0
    team.section("From a tar", home)
    assert "Stage 'extract-features' didn't change" in team.shell(home, "dvc repro extract-features")
    theirs = contents(hers / SET)
    del theirs["explained_variance.svg"]  # not in the manifest, so not exported
    assert contents(home / SET) == theirs
    assert team.passes(home) == 0


def test_a_shared_cache_needs_no_copy(team):
    (team.root / "cache").mkdir()
    homes = [team.member(name) for name in ("desk", "lab")]
    for home in homes:
        team.shell(home, f"git clone -q {team.root}/hub.git feddifrc")
        output = team.section("One machine: a shared cache instead of a storage", home)
        assert ran(output) == set()
    files = [home / "feddifrc" / SET / "shard-00000.h5" for home in homes]
    assert files[0].samefile(files[1])
    assert not os.stat(files[0]).st_mode & 0o222


@pytest.fixture
def s3():
    """Start an S3 server on loopback, and yield its port."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


def test_push_and_pull_through_s3(team, s3):
    import boto3

    keys = {"AWS_ACCESS_KEY_ID": "team", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{s3}", region_name="us-east-1",
        aws_access_key_id="team", aws_secret_access_key="secret",
    )  # fmt: skip
    client.create_bucket(Bucket="team")
    team.section("S3, MinIO and the like", team.root / "a", s3, **keys)
    hers = contents(team.root / "a" / "feddifrc" / SET)
    stored = client.list_objects_v2(Bucket="team")["Contents"]
    assert {len(content) for content in hers.values()} < {item["Size"] for item in stored}  # and their listing
    home = team.member("far")
    team.section("B pulls from S3", home, s3, **keys)
    assert contents(home / "feddifrc" / SET) == hers
