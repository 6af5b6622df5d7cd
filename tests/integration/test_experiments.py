"""DVC's experiments: run beside the project, with the files that only the project has, and shown in its report."""

import json
import os
import re
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.feature_store import FeatureSet
from tests.conftest import REPOSITORY, invoke, write_params
from tests.extract_features import tiny_models
from tests.integration.project import copy_tracked, git
from tests.integration.test_dvc import BIN, SWEEP, dvc, ran


def make(root, bin_folder, changes):
    """A committed project under git and DVC, before any stage has run."""
    copy_tracked(root)
    write_params(root, changes)
    (root / ".venv").mkdir()
    (root / ".venv" / "bin").symlink_to(bin_folder)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "start")


def test_experiment_with_another_timestep(tmp_path, quick_bin):
    make(tmp_path, quick_bin, SWEEP | {"sweep.methods": ["feddifrc"], "sweep.seeds": [0, 1]})
    dvc(tmp_path, "repro")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "run")
    output = dvc(tmp_path, "exp", "run", "--temp", "--name", "early", "--set-param", "extract_features.timestep=100")
    assert ran(output) == {"extract-features", "analyze-features", "train-fl@feddifrc-dir05", "report"}
    assert "up to date" in dvc(tmp_path, "status")
    assert invoke(tmp_path, "report", "--experiments").exit_code == 0
    page = (tmp_path / "report" / "index.html").read_text()
    table = page.partition('id="table-experiments"')[2].partition("</table>")[0]
    cells = re.findall(r"<td[^>]*>\s*([^<]*)", table)
    assert cells[0] == "current" and cells[3:5] == ["early", "extract_features.timestep = 100"]
    for position in (2, 5):
        mean, spread = map(float, cells[position].split(" ± "))
        assert 0 <= mean <= 100 and 0 <= spread <= 100
    dvc(tmp_path, "checkout", "--force")  # the report without the table
    dvc(tmp_path, "remote", "add", "--default", "team", str(tmp_path / "remote"))
    git(tmp_path, "commit", "--quiet", "--all", "--message", "remote")
    dvc(tmp_path, "push")
    git(tmp_path, "clone", "--quiet", ".", "clone")
    dvc(tmp_path / "clone", "pull")
    assert "up to date" in dvc(tmp_path / "clone", "status")
    assert (tmp_path / "clone" / "data" / "README.md").exists()


PROMPTS = {"dark": "a dark photo", "light": ["a light photo", "a photo of much light"]}
FILES = {  # every key that names a path, but for words of self-supervised prompts; all are files that git does not know
    "prepare_data.path": "mine/images",
    "prepare_backbone.source": "mine/model",
    "extract_features.class_prompts": "mine/prompts.json",
    "extract_features.basis": "mine/basis.h5",
    "extract_features.image_conditioning": "mine/clip",
}
WORDS = {
    "extract_features.prompts": "self-supervised",
    "extract_features.negative_words": "mine/words.txt",
    "extract_features.negatives": 2,
    "extract_features.class_prompts": None,
}


@pytest.fixture(scope="module")
def with_files(tmp_path_factory, extracted, quick_bin):
    """A project whose keys name untracked files in its folder."""
    root = tmp_path_factory.mktemp("files")
    folder = {"prepare_data.name": "photos", "prepare_data.source": "folder", "prepare_data.train_subset": None}
    changes = folder | {"prepare_backbone.name": "own", "extract_features.image_size": 32}
    make(root, quick_bin, changes | {f"{key}": value for key, value in FILES.items()})
    mine = root / "mine"
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for label, brightness in (("dark", 0), ("light", 128)):
            (mine / "images" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = brightness + rng.integers(0, 128, (32, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(mine / "images" / split / label / f"{number}.png")
    shutil.copytree(REPOSITORY / "stages" / "prepare_backbone" / "tiny-sd", mine / "model")
    shutil.copy(extracted / "data" / "features" / "digits-tiny-sd-t300" / "basis.h5", mine)
    with torch.random.fork_rng(devices=[]):
        tiny_models.clip_vision(projection=64).save_pretrained(mine / "clip")
    (mine / "prompts.json").write_text(json.dumps(PROMPTS))
    (mine / "words.txt").write_text("cat\ndog\nhouse\n")
    return root


def content_of(root, name):
    """The inputs of an experiment's feature set."""
    refs = git(root, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    (ref,) = (ref for ref in refs if ref.endswith(f"/{name}"))
    git(root, "checkout", "--quiet", ref, "--", "dvc.lock")
    features = root / "data" / "features" / "photos-own-t300"
    dvc(root, "checkout", "--force", str(features.relative_to(root)))
    git(root, "rm", "--quiet", "--force", "dvc.lock")
    return FeatureSet(features).manifest.content


def test_experiment_finds_untracked_files_of_the_project(with_files):
    output = dvc(with_files, "exp", "run", "--temp", "--name", "files", "extract-features")
    assert ran(output) == {"prepare-data", "prepare-backbone", "extract-features"}
    content = content_of(with_files, "files")
    assert content.class_names == ["dark", "light"]
    assert content.prompts == [["a dark photo"], PROMPTS["light"]]
    assert content.basis_sha256 and content.image_conditioning
    sets = [f"--set-param={key}={'null' if value is None else value}" for key, value in WORDS.items()]
    dvc(with_files, "exp", "run", "--temp", "--name", "words", *sets, "extract-features")
    assert ["a photo of a house"] in content_of(with_files, "words").prompts


def test_queued_experiment_finds_untracked_files_of_the_project(with_files):
    denoise = "--set-param=extract_features.denoise_prompt=a photo"
    dvc(with_files, "exp", "run", "--queue", "--name", "queued", denoise, "extract-features")
    active = os.pathsep.join([str(BIN), os.environ["PATH"]])
    dvc(with_files, "queue", "start", PATH=active)  # starts a worker by the name dvc
    for _ in range(60):
        status = re.search(r"queued.* (\w+)\s*$", dvc(with_files, "queue", "status"), re.MULTILINE)
        if status and status[1] in ("Success", "Failed"):
            break
        time.sleep(0.5)
    assert status and status[1] == "Success", dvc(with_files, "queue", "logs", "queued")
    dvc(with_files, "queue", "stop")
    content = content_of(with_files, "queued")
    assert content.denoise_prompt == "a photo" and content.prompts == [["a dark photo"], PROMPTS["light"]]
