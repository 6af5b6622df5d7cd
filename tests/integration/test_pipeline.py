"""Both stages through the command line, also when they are interrupted or get invalid input."""

import csv
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors import safe_open

from pipeline.feature_store import FeatureSet, verification
from tests.conftest import invoke, write_params
from tests.faults import program

RUN = ("train-fl", "--partition", "dir05", "--seed", "0", "--method")


def test_from_images_to_report(project):
    for method in ("fedavg", "feddifrc"):
        result = invoke(project, *RUN, method)
        assert result.exit_code == 0, result.output
        folder = project / "results" / f"{method}-dir05" / "s0"
        with (folder / "rounds.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        metrics = json.loads((folder / "metrics.json").read_text())
        assert [row["round"] for row in rows] == ["1", "2"]
        assert metrics["final_accuracy"] == float(rows[-1]["accuracy"])
        assert json.loads((folder / "details.json").read_text())["wall_seconds"] > 0
        assert "mean_domain_accuracy" not in metrics  # digits are of one domain
        assert json.loads((folder / "config.json").read_text())["seed"] == 0
        with safe_open(folder / "model.safetensors", "np") as weights:
            assert all(np.isfinite(weights.get_tensor(name)).all() for name in weights.keys())
    assert "train_tdcl" in rows[0] and "train_ndcr" in rows[0]
    result = invoke(project, "report")
    assert result.exit_code == 0, result.output
    page = (project / "report" / "index.html").read_text()
    assert "feddifrc" in page and f"{100 * metrics['mean_last5_accuracy']:.2f}" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)  # nothing is fetched


def test_equal_seeds_give_equal_bytes(project):
    def files():
        folder = project / "results" / "feddifrc-dir05" / "s0"
        return [(folder / name).read_bytes() for name in ("rounds.csv", "partition.json", "model.safetensors")]

    assert invoke(project, *RUN, "feddifrc").exit_code == 0
    first = files()
    shutil.rmtree(project / "results")  # a complete run would be kept
    assert invoke(project, *RUN, "feddifrc").exit_code == 0
    assert files() == first


def test_every_image_has_its_features(extracted):
    features = FeatureSet(extracted / "data" / "features" / "digits-tiny-sd-t300")
    rows = features.read(np.arange(120))
    assert rows.index.tolist() == list(range(120))
    assert rows.prompted.shape == (120, 2, 144)
    assert (rows.prompted > 0).all()  # energies
    assert verification.problems(features.path, full=True) == []


def test_the_prompt_reaches_the_features(extracted):
    rows = FeatureSet(extracted / "data" / "features" / "digits-tiny-sd-t300").read(np.arange(120))
    distance = np.linalg.norm(rows.prompted[:, 0].astype(float) - rows.prompted[:, 1].astype(float), axis=1)
    assert distance.min() > 0


def test_killed_extraction_resumes_with_identical_bytes(extracted, tmp_path):
    changes = {"extract_features.rows_per_shard": 10, "extract_features.negatives": 1}  # 12 shards
    for name in ("complete", "killed"):
        root = tmp_path / name
        root.mkdir()
        write_params(root, changes)
        (root / "models").symlink_to(extracted / "models")
        (root / "data").mkdir()
        for part in ("datasets", "backbones"):
            (root / "data" / part).symlink_to(extracted / "data" / part)
    program.succeed(tmp_path / "complete", "extract-features")

    command = program.start(tmp_path / "killed", "extract-features")
    staging = tmp_path / "killed" / ".pipeline" / "staging"
    while command.process.is_alive() and len(list(staging.glob("*/shard-*.h5"))) < 3:
        time.sleep(0.01)
    command.process.kill()
    assert command.end() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "data" / "features").exists()

    log = program.succeed(tmp_path / "killed", "extract-features")
    done = int(re.search(r"resuming: (\d+) of 12 shards are done", log)[1])
    assert done >= 2
    assert f"{120 - 10 * done} images" in log  # only the missing ones were computed
    sets = [tmp_path / name / "data" / "features" / "digits-tiny-sd-t300" for name in ("complete", "killed")]
    assert sorted(file.name for file in sets[0].iterdir()) == sorted(file.name for file in sets[1].iterdir())
    for file in sets[0].iterdir():
        assert file.read_bytes() == (sets[1] / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*RUN, "fedprix"), "params.yaml has no methods.fedprix. Available: fedavg"),
        ((*RUN, "fedavg", "--batch-size", "0"), "train_fl.batch_size = 0: input should be greater than or equal to 1"),
        (("extract-features", "--timestep", "x"), "extract_features.timestep = 'x': input should be a valid integer"),
        (("extract-features", "--version", "99"), "this program computes version"),
        (
            (*RUN, "feddifrc", "--set", "extract_features.timestep=7"),
            "holds no feature set (the folder does not exist). Run `pipeline extract",
        ),
        (("prepare-data", "--source", "folder", "--path", "nowhere"), "nowhere is not a folder"),
        (("prepare-backbone", "--source", "org/model"), "org/model needs a commit"),
        (("prepare-backbone", "--source", "some where"), "is neither embedded, nor a directory, nor a hub id"),
        (
            ("report", "--set", "sweep.seeds=[7]"),
            "of the 2 runs of the sweep are missing (fedavg-dir05-s7, ...). Run `dvc repro`",
        ),
    ],
)
def test_user_error_is_one_line(project, arguments, message):
    result = invoke(project, *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_second_method_is_refused_rather_than_trained_alone(project):
    result = invoke(project, "train-fl", "--method", "fedavg", "--method", "fedprox", "--partition", "dir05")
    assert result.exit_code == 2 and not (project / "results").exists()
    assert "--method is given 2 times. Give it once per command; `dvc repro` trains the sweep." in result.output


def test_unreachable_hub_is_reported_on_one_line(project):
    result = invoke(project, "prepare-backbone", "--name", "x", "--source", "org/model", "--revision", "a" * 40)
    assert result.exit_code == 1
    assert "org/model is not in the hub cache, and HF_HUB_OFFLINE is set" in result.output


COMMANDS = [
    "init",
    "prepare-data",
    "prepare-backbone",
    "extract-features",
    "synthesize",
    "train-fl",
    "report",
    "preset",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, project):
    result = invoke(project, command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output and f"\n    pipeline {command}" in result.output


def test_interrupt_message_says_what_is_kept(project, tmp_path):
    command = program.start(project, *RUN, "fedavg", "--num-rounds", "5000", log=tmp_path / "log")
    rounds = project / "results" / "fedavg-dir05" / "s0" / "rounds.csv"
    while command.process.is_alive() and not rounds.exists():
        time.sleep(0.05)
    os.kill(command.process.pid, signal.SIGINT)
    assert command.end() == 130
    assert command.output.strip().splitlines()[-1].startswith("Interrupted: completed work is kept")


def test_complete_set_with_a_flipped_byte_is_recomputed(extracted, tmp_path):
    write_params(tmp_path, {})
    (tmp_path / "models").symlink_to(extracted / "models")
    shutil.copytree(extracted / "data", tmp_path / "data")
    shard = tmp_path / "data" / "features" / "digits-tiny-sd-t300" / "shard-00001.h5"
    original = shard.read_bytes()
    shard.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    log = program.succeed(tmp_path, "extract-features", log=tmp_path / "log")
    assert "shard-00001.h5 is corrupt" in log
    assert shard.read_bytes() == original


def test_new_images_name_the_feature_sets_of_those_they_replace(extracted, tmp_path):
    write_params(tmp_path, {})
    shutil.copytree(extracted / "data", tmp_path / "data")
    sets = tmp_path / "data" / "features"
    (sets / "broken").mkdir()
    said = f"{sets / 'digits-tiny-sd-t300'} was extracted from the images that these replace"
    assert said not in invoke(tmp_path, "prepare-data").output  # the same images
    assert said in invoke(tmp_path, "prepare-data", "--train-subset", "50").output
    assert said not in invoke(tmp_path, "prepare-data", "--train-subset", "40").output  # but from those before


def test_prepared_images_unlike_the_settings_are_named(project):
    run = ("train-fl", "--method", "fedavg", "--partition", "dir05", "--seed", "0")
    assert "but prepare_data has" not in invoke(project, *run).output
    changes = ("--set", "prepare_data.train_subset=50", "--set", "prepare_data.image_size=16")
    said = (
        "digits has 120 training images and images of 32 px, but prepare_data has train_subset = 50 and image_size = 16"
    )
    assert f"{said}. Run `pipeline prepare-data`" in invoke(project, *run, *changes).output
