"""Damaged, foreign and misplaced files are reported in one line or recomputed, and nothing else is changed."""

import json
import os
import shutil

import pytest

from tests.faults import program
from tests.faults.program import DATA, EXTRACT, RUN, SET, SYNTHESIZE, TRAIN

PREPARE, BACKBONE, REPORT = ("prepare-data",), ("prepare-backbone",), ("report",)
WEIGHTS = "models/tiny-sd/unet/diffusion_pytorch_model.safetensors"
BALANCED = ("train-fl", "--method", "fedavg", "--partition", "iid", "--seed", "0", "--balance-with-synthetic", "mean")
TRAIN_AGAIN = (*TRAIN, "--overwrite")


def flip(file):
    content = bytearray(file.read_bytes())
    position = next(
        (i for i, byte in enumerate(content) if content[i - 9 : i] == b'"sha256": '[-9:]), len(content) // 2
    )
    content[position + 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


DAMAGE = {"flipped": flip, "truncated": truncate, "empty": empty}
SOME_DAMAGE = ["flipped", *(pytest.param(name, marks=pytest.mark.faults) for name in ("truncated", "empty"))]

# file, the command that reads it, texts of its error, the commands that repair it
READ = {
    "images": (f"{DATA}/train.h5", EXTRACT, ["digits/train.h5", "`pipeline prepare-data`"], [PREPARE]),
    "test-images": (f"{DATA}/test.h5", TRAIN, ["digits/test.h5", "`pipeline prepare-data`"], [PREPARE]),
    "data-manifest": (f"{DATA}/manifest.json", TRAIN, [f"{DATA}", "repare", "`pipeline "], [PREPARE]),
    "weights": (WEIGHTS, EXTRACT, ["unet/diffusion_pytorch_model.safetensors", "`pipeline prepare-backbone`"],
        [BACKBONE]),
    "model-index": ("models/tiny-sd/model_index.json", EXTRACT, ["model_index.json", "prepare-backbone`"], [BACKBONE]),
    "backbone-manifest": ("data/backbones/tiny-sd.json", EXTRACT, ["backbones/tiny-sd.json",
        "prepare-backbone`"], [BACKBONE]),
    "manifest": (f"{SET}/manifest.json", TRAIN, [f"{SET}", "extract-features`"], [EXTRACT]),
    "basis": (f"{SET}/basis.h5", TRAIN, ["basis.h5", "extract-features`"], [EXTRACT]),
    "shard": (f"{SET}/shard-00001.h5", TRAIN, ["shard-00001.h5", "extract-features`"], [EXTRACT]),
    "synthetic-images": ("data/datasets/digits-synthetic/train.h5", BALANCED, ["digits-synthetic/train.h5"],
        [SYNTHESIZE]),
    "metrics": (f"{RUN}/metrics.json", REPORT, [f"{RUN}", "Train it again"], [TRAIN_AGAIN]),
    "rounds": (f"{RUN}/rounds.csv", REPORT, [f"{RUN}", "Train it again"], [TRAIN_AGAIN]),
    "config": (f"{RUN}/config.json", REPORT, [f"{RUN}", "Train it again"], [TRAIN_AGAIN]),
    "details": (f"{RUN}/details.json", REPORT, [f"{RUN}", "Train it again"], [TRAIN_AGAIN]),
    "clients": (f"{RUN}/clients.csv", REPORT, [f"{RUN}", "Train it again"], [TRAIN_AGAIN]),
    "timing": (f"{RUN}/timing.csv", REPORT, [f"{RUN}/timing.csv", "Train it again"], [TRAIN_AGAIN]),
    "picture": (f"{RUN}/partition.svg", REPORT, [f"{RUN}/partition.svg", "Train it again"], [TRAIN_AGAIN]),
    "run-weights": (f"{RUN}/model.safetensors", REPORT, [f"{RUN}/model.safetensors", "Train it again"], [TRAIN_AGAIN]),
    "partition": (f"{RUN}/partition.json", REPORT, [f"{RUN}", "Train it again"], [TRAIN_AGAIN]),
    "checksums": (f"{RUN}/SHA256SUMS", REPORT, [f"{RUN}", "Train it again"], [TRAIN_AGAIN]),
    "run-of-sweep": (f"results/.sweep/{RUN.parent.name}.sha256", REPORT, [f"{RUN}", "Train it again"], [TRAIN_AGAIN]),
}  # fmt: skip


SOME_READ = [
    kind
    if kind in ("images", "weights", "manifest", "basis", "shard", "rounds")
    else pytest.param(kind, marks=pytest.mark.faults)
    for kind in READ
]


def unextracted(project):
    shutil.rmtree(project / SET)
    shutil.rmtree(project / ".pipeline")


@pytest.mark.parametrize("damage", SOME_DAMAGE)
@pytest.mark.parametrize("kind", SOME_READ)
def test_damaged_file_is_named_and_repaired_by_the_advised_command(made, project, trial, kind, damage):
    name, command, says, repair = READ[kind]
    if name.startswith("models"):
        (project / "models").unlink()
        shutil.copytree(made.root / "models", project / "models")
    if command == EXTRACT:
        unextracted(project)
    if command == TRAIN:
        program.unfinish_run(project)
    with trial(f"{damage} file") as tried:
        DAMAGE[damage](project / name)
        before = program.contents(project, leave_out=[])
        program.refuse(project, *command, says=says)
        tried.compare(before, without_locks(program.contents(project), before))
        for again in repair:
            program.succeed(project, *again)
        program.succeed(project, *command)
        tried.compare(program.contents(made.root / "data"), program.contents(project / "data"))


def without_locks(found, before):
    """Leave out lock files and the plan of a set, which a refused command may create."""
    return {
        name: content
        for name, content in found.items()
        if name in before or not ("/locks/" in name or name.endswith("/plan.json"))
    }


@pytest.mark.parametrize("damage", SOME_DAMAGE)
def test_damaged_params_are_rejected(project, trial, damage):
    file = project / "params.yaml"
    good = file.read_bytes()
    with trial(f"{damage} file") as tried:
        DAMAGE[damage](file)
        if damage == "flipped":
            file.write_bytes(good.replace(b"timestep: 300", b"timestep: 30p"))
        before = program.contents(project)
        code, output = program.run(project, *EXTRACT)
        assert code == 1 and "Traceback" not in output and "params.yaml" in output
        tried.compare(before, program.contents(project))
        file.write_bytes(good)
        program.succeed(project, *EXTRACT)


STATE = {
    "staged-shard": ("staging/*/shard-00002.h5", EXTRACT),
    "staged-basis": ("staging/*/basis.h5", EXTRACT),
    "entry": ("staging/*/shard-00002.json", EXTRACT),
    "basis-entry": ("staging/*/basis.json", EXTRACT),
    "latents": ("latents/*/latents-00002.safetensors", EXTRACT),
    "checkpoint": ("checkpoints/*/round-*.safetensors", TRAIN),
    "class": ("synthesize/*/class-00003.safetensors", SYNTHESIZE),
}


SOME_STATE = [
    kind if kind in ("staged-shard", "class", "checkpoint") else pytest.param(kind, marks=pytest.mark.faults)
    for kind in STATE
]


@pytest.fixture(scope="module")
def interrupted(made, tmp_path_factory):
    """A project in which extraction, generation and training were killed shortly before their end."""
    root = tmp_path_factory.mktemp("interrupted") / "project"
    shutil.copytree(made.root, root, ignore=shutil.ignore_patterns("models", ".pipeline"))
    (root / "models").symlink_to(made.root / "models")
    for command, output in ((TRAIN, RUN), (SYNTHESIZE, program.Path("data/datasets/digits-synthetic")), (EXTRACT, SET)):
        shutil.rmtree(root / output)
        before_end = {"train-fl": 18, "synthesize": 22, "extract-features": 14}[command[0]]
        at = made.commands[command[0]].operations - before_end
        more = ("--set", "runtime.cache_latents=true") if command == EXTRACT else ()
        program.run(root, *command, *more, under=program.Conditions(dies_at=at))
        assert not (root / output / "manifest.json").exists() and not (root / output / "SHA256SUMS").exists()
    return root


@pytest.mark.parametrize("damage", SOME_DAMAGE)
@pytest.mark.parametrize("kind", SOME_STATE)
def test_damaged_state_is_recomputed(made, interrupted, tmp_path, trial, kind, damage):
    pattern, command = STATE[kind]
    project = tmp_path / "project"
    shutil.copytree(interrupted, project, symlinks=True)
    if command == TRAIN:
        shutil.copytree(made.root / SET, project / SET)
    with trial(f"{damage} file of unfinished work") as tried:
        (file,) = (project / ".pipeline").glob(pattern)
        DAMAGE[damage](file)
        more = ("--set", "runtime.cache_latents=true") if kind == "latents" else ()
        output = program.succeed(project, *command, *more)
        assert "Traceback" not in output
        seconds = ("timing.csv", "metrics.json", "details.json", "SHA256SUMS")
        for folder in {EXTRACT: [SET], TRAIN: [RUN], SYNTHESIZE: [program.Path("data/datasets/digits-synthetic")]}[
            command
        ]:
            tried.compare(
                program.contents(made.root / folder, leave_out=seconds),
                program.contents(project / folder, leave_out=seconds),
            )


def edit(**changes):
    def change(file):
        content = json.loads(file.read_text())
        for dotted, value in changes.items():
            *parents, key = dotted.split("__")
            inner = content
            for parent in parents:
                inner = inner[parent]
            inner[key] = value
        file.write_text(json.dumps(content))

    return change


OUTSIDE = {
    "up": (f"{SET}/manifest.json", edit(basis__file="../../outside.h5"), TRAIN, "manifest.json is not a manifest"),
    "absolute": (f"{SET}/manifest.json", edit(shards__0__file="/dev/zero"), TRAIN, "manifest.json is not a manifest"),
    "newer": (f"{SET}/manifest.json", edit(format_version=4), TRAIN, "version 4, but this program reads 1, 2 and 3"),
    "newer-with-more": (
        f"{SET}/manifest.json", lambda file: (edit(format_version=4)(file), edit(codec="zstd")(file)), TRAIN,
        "has format version 4, but this program reads 1, 2 and 3",
    ),
    "model-up": ("data/backbones/tiny-sd.json", edit(files={"../../secret": "0" * 64}), EXTRACT, "tiny-sd.json"),
    "model-absolute": ("data/backbones/tiny-sd.json", edit(files={"/dev/zero": "0" * 64}), EXTRACT, "tiny-sd.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OUTSIDE)
def test_manifest_that_names_outside_files_or_is_newer_is_rejected(made, project, trial, kind):
    name, change, command, says = OUTSIDE[kind]
    with trial("manifest of a newer format, or with paths outside the folder") as tried:
        good = (project / name).read_bytes()
        change(project / name)
        before = program.contents(project)
        program.refuse(project, *command, says=[says])
        tried.compare(before, without_locks(program.contents(project), before))
        (project / name).write_bytes(good)
        program.succeed(project, *command)


@pytest.mark.parametrize("link", ["/dev/zero", "/dev/full", "/etc/hostname", "nowhere", "shard-00001.h5", "."])
def test_link_in_place_of_a_shard_is_rejected(made, project, trial, link):
    with trial("link instead of a file") as tried:
        shard = project / SET / "shard-00001.h5"
        shard.unlink()
        shard.symlink_to(link)
        program.unfinish_run(project)
        program.refuse(project, *TRAIN, says=["shard-00001.h5", "`dvc pull"])
        program.succeed(project, *EXTRACT)
        program.succeed(project, *TRAIN)
        tried.compare(program.contents(made.root / SET), program.contents(project / SET))


def test_shard_or_basis_of_another_set_is_rejected(made, project, trial):
    with trial("shard or basis of another set") as tried:
        program.unfinish_run(project)
        other = project / "data/features/digits-tiny-sd-t100"
        program.succeed(project, *EXTRACT, "--timestep", "100")
        for name in ("shard-00000.h5", "basis.h5"):
            good = (project / SET / name).read_bytes()
            shutil.copy(other / name, project / SET / name)
            before = program.contents(project / "data")
            program.refuse(project, *TRAIN, says=[name, "extract-features`"])
            tried.compare(before, program.contents(project / "data"))
            (project / SET / name).write_bytes(good)
        shutil.copy(project / SET / "shard-00001.h5", project / SET / "shard-00002.h5")  # of this set, out of place
        program.refuse(project, *TRAIN, says=["shard-00002.h5", "extract-features`"])
        program.succeed(project, *EXTRACT)
        program.succeed(project, *TRAIN)
        tried.compare(program.contents(made.root / SET), program.contents(project / SET))


def test_features_of_another_data_set_are_rejected(project, trial):
    with trial("shard or basis of another set"):
        program.succeed(project, "prepare-data", "--seed", "1")
        program.refuse(project, *TRAIN, says=["another data set", "hash", "extract-features --overwrite`"])
        program.refuse(project, *EXTRACT, says=["of other settings or data (dataset_hash)", "--overwrite"])
        program.succeed(project, *EXTRACT, "--overwrite")
        program.succeed(project, *TRAIN_AGAIN)


def test_file_in_place_of_a_folder_and_the_reverse_are_rejected(project, trial):
    with trial("file instead of a folder, folder instead of a file"):
        shutil.rmtree(project / "results")
        (project / "results").write_text("")
        line = program.refuse(project, *TRAIN, says=["results"])
        assert os.strerror(20) in line or os.strerror(17) in line
        (project / "results").unlink()
        program.succeed(project, *TRAIN)
        (project / SET / "shard-00000.h5").unlink()
        (project / SET / "shard-00000.h5").mkdir()
        program.unfinish_run(project)
        program.refuse(project, *TRAIN, says=["shard-00000.h5", "extract-features`"])
        program.succeed(project, *EXTRACT)
        program.succeed(project, *TRAIN)
