"""Presets: every one that ships fits, and a merge changes what it says and nothing else."""

import shutil

import pytest

from pipeline import config, presets
from pipeline.errors import PipelineError
from tests.conftest import REPOSITORY, invoke

SHIPPED = [file.stem for file in sorted((REPOSITORY / "presets").glob("*.yaml"))]


@pytest.fixture
def project(tmp_path):
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    shutil.copytree(REPOSITORY / "presets", tmp_path / "presets")
    return tmp_path


@pytest.mark.parametrize("name", SHIPPED)
def test_every_preset_fits(project, name):
    experiments = presets.apply(name, project / "params.yaml").experiments
    made = config.load(project / "params.yaml")
    for method in made.params.sweep.methods:
        made.settings("methods", method)
    for partition in made.params.sweep.partitions:
        made.settings("partitions", partition)
    assert len(experiments) == (7 if name.endswith("timesteps") else 1)


def test_the_papers_protocol(project):
    presets.apply("cifar10-table", project / "params.yaml")
    train = config.load(project / "params.yaml").params.train_fl
    found = (train.model, train.num_clients, train.clients_per_round, train.num_rounds, train.local_epochs)
    assert found == ("resnet10", 10, 5, 50, 10)
    assert (train.batch_size, train.learning_rate, train.momentum) == (64, 0.01, 0.9)


def test_a_merge_keeps_comments_and_other_values(project):
    (project / "presets" / "one.yaml").write_text("# one key\ntrain_fl: {num_rounds: 3}\nsweep: {seeds: [4, 5]}\n")
    before = (project / "params.yaml").read_text().splitlines()
    said = invoke(project, "preset", "one")
    assert "train_fl.num_rounds: 25 -> 3\nsweep.seeds: [0, 1, 2] -> [4, 5]\n" in said.output
    assert "next: pipeline preset one --run" in said.output
    after = (project / "params.yaml").read_text().splitlines()
    added = [line for line in after if line not in before]
    assert [line.strip() for line in added] == ["num_rounds: 3", "seeds: [4, 5]"]
    assert len(after) == len(before)


def test_a_preset_that_does_not_fit_changes_nothing(project):
    before = (project / "params.yaml").read_bytes()
    (project / "presets" / "wrong.yaml").write_text("base: digits\ntrain_fl: {num_rounds: 0}\n")
    with pytest.raises(PipelineError, match="preset wrong: train_fl.num_rounds = 0"):
        presets.apply("wrong", project / "params.yaml")
    with pytest.raises(PipelineError, match="no preset digits-tabel; did you mean digits-table"):
        presets.apply("digits-tabel", project / "params.yaml")
    assert (project / "params.yaml").read_bytes() == before
    assert not list(project.glob("*.tmp"))


def test_a_preset_may_stand_elsewhere(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "mine.yaml"
    elsewhere.write_text("# mine\nbase: digits-table\nextract_features: {timestep: 50}\n")
    assert invoke(project, "preset", str(elsewhere)).exit_code == 0
    assert config.load(project / "params.yaml").params.extract_features.timestep == 50
    elsewhere.unlink()
    said = invoke(project, "preset", str(elsewhere))
    assert said.exit_code == 1 and "mine.yaml is missing: a preset is a name in" in said.output


def test_the_command_lists_and_merges(project):
    listed = invoke(project, "preset")
    assert all(name in listed.output for name in SHIPPED)
    assert invoke(project, "preset", "digits-ablation").exit_code == 0
    assert config.load(project / "params.yaml").params.sweep.methods == ["fedavg", "tdcl", "ndcr", "feddifrc"]


def test_a_base_sets_whatever_its_presets_change():
    """So that one preset after another leaves nothing of the first behind."""
    folder = REPOSITORY / "presets"
    for file in folder.glob("*.yaml"):
        own = config.read_yaml(file)
        if "base" not in own:
            continue
        base = config.read_yaml(folder / f"{own['base']}.yaml")
        for section in set(own) - {"base", "sweep", "methods", "partitions", "report", "experiments"}:
            missing = set(own[section]) - set(base[section])
            assert not missing, f"{file.name}: {section} {missing}"
