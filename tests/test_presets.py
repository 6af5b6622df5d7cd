"""Presets: all shipped ones are valid, and a merge changes only their keys."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString

from pipeline.errors import PipelineError
from pipeline.settings import config, presets
from tests.conftest import REPOSITORY, invoke

SHIPPED = [file.stem for file in sorted((REPOSITORY / "presets").glob("*.yaml"))]


@pytest.fixture
def project(tmp_path):
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    shutil.copytree(REPOSITORY / "presets", tmp_path / "presets")
    return tmp_path


def apply(name, params_file):
    merge = presets.merge(name, params_file)
    merge.write()
    return merge


@pytest.mark.parametrize("name", SHIPPED)
def test_every_preset_is_valid(project, name):
    experiments = apply(name, project / "params.yaml").experiments
    made = config.load(project / "params.yaml")
    for method in made.params.sweep.methods:
        made.settings("methods", method)
    for partition in made.params.sweep.partitions:
        made.settings("partitions", partition)
    several = {"digits-timesteps": 7, "cifar10-timesteps": 7, "digits-negatives": 2, "digits-heterogeneity": 5}
    several |= {"digits-guides": 6, "digits-tuned": 2, "digits-many-clients": 2}
    assert len(experiments) == several.get(name, 1)
    for changes in experiments:
        config.load(project / "params.yaml", changes)


def test_cifar10_table_follows_the_paper(project):
    apply("cifar10-table", project / "params.yaml")
    train = config.load(project / "params.yaml").params.train_fl
    found = (train.model, train.num_clients, train.clients_per_round, train.num_rounds, train.local_epochs)
    assert found == ("resnet10", 10, 5, 50, 10)
    assert (train.batch_size, train.learning_rate, train.momentum) == (64, 0.01, 0.9)


def test_merge_keeps_comments_and_other_values(project):
    (project / "presets" / "one.yaml").write_text("# one key\ntrain_fl: {num_rounds: 3}\nsweep: {seeds: [4, 5]}\n")
    before = (project / "params.yaml").read_text().splitlines()
    result = invoke(project, "preset", "one")
    assert "train_fl.num_rounds: 25 -> 3\nsweep.seeds: [0, 1, 2] -> [4, 5]\n" in result.output
    assert "next: dvc repro, or pipeline preset one --run" in result.output
    after = (project / "params.yaml").read_text().splitlines()
    added = [line for line in after if line not in before]
    assert [line.strip() for line in added] == ["num_rounds: 3", "seeds: [4, 5]"]
    assert len(after) == len(before)


def test_invalid_preset_changes_nothing(project):
    before = (project / "params.yaml").read_bytes()
    (project / "presets" / "wrong.yaml").write_text("base: digits\ntrain_fl: {num_rounds: 0}\n")
    with pytest.raises(PipelineError, match="preset wrong: train_fl.num_rounds = 0"):
        apply("wrong", project / "params.yaml")
    with pytest.raises(PipelineError, match=r"Unknown preset digits-tabel\. Did you mean digits-table\?"):
        apply("digits-tabel", project / "params.yaml")
    assert (project / "params.yaml").read_bytes() == before
    assert not list(project.glob("*.tmp"))


def test_preset_by_absolute_path(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "mine.yaml"
    elsewhere.write_text("# mine\nbase: digits-table\nextract_features: {timestep: 50}\n")
    assert invoke(project, "preset", str(elsewhere)).exit_code == 0
    assert config.load(project / "params.yaml").params.extract_features.timestep == 50
    elsewhere.unlink()
    result = invoke(project, "preset", str(elsewhere))
    assert result.exit_code == 1
    assert f"Unknown preset {elsewhere} (looked for {elsewhere}). Available: cifar10, cifar10-" in result.output


def test_preset_by_path_relative_to_the_project(project, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert invoke(project, "preset", "digits").exit_code == 0
    (project / "mine.yaml").write_text("train_fl: {num_rounds: 7}\n")
    assert invoke(project, "preset", "mine.yaml").exit_code == 0
    assert config.load(project / "params.yaml").params.train_fl.num_rounds == 7
    (project / "mine.yaml").unlink()
    result = invoke(project, "preset", "mine.yaml")
    assert f"Unknown preset mine.yaml (looked for {Path.cwd()}/mine.yaml and {project}/mine.yaml)" in result.output
    assert "Did you mean digits-table?" in invoke(project, "preset", "digits-tabel.yaml").output


def test_project_without_presets_uses_the_packages_own(project):
    shutil.rmtree(project / "presets")
    listed = invoke(project, "preset").output
    assert all(name in listed for name in SHIPPED)
    assert invoke(project, "preset", "cifar10").exit_code == 0
    assert config.load(project / "params.yaml").params.prepare_data.name == "cifar10"


def test_project_preset_overrides_the_packages_own(project):
    (project / "presets" / "digits.yaml").write_text("# mine\ntrain_fl: {num_rounds: 3}\n")
    assert presets.describe(project / "presets")["digits"] == "mine"
    assert invoke(project, "preset", "digits").exit_code == 0
    assert config.load(project / "params.yaml").params.train_fl.num_rounds == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_fl: 3", "Preset wrong: train_fl must be a section"),
        ("base: wrong", "Preset wrong is a base of itself"),
        ("experiments: {train_fl.num_rounds: 0}", "train_fl.num_rounds = 0: input should be"),
        ("experiments: [{train_fl.num_rounds: 0}]", "train_fl.num_rounds = 0: input should be"),
        ("experiments: 3", "Preset wrong: experiments must map keys to lists of values, or list mappings"),
        ("experiments: []", "Preset wrong: experiments must map keys to lists of values, or list mappings"),
        ("experiments: [3]", "Preset wrong: experiments must map keys to lists of values, or list mappings"),
    ],
)
def test_invalid_preset_is_one_line(project, text, message):
    (project / "presets" / "wrong.yaml").write_text(text + "\n")
    result = invoke(project, "preset", "wrong")
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1) and message in result.output


@pytest.mark.parametrize("name", SHIPPED)
def test_overrides_of_experiments_are_what_dvc_reads(project, name):
    experiments = apply(name, project / "params.yaml").experiments
    before = config.read_yaml(project / "params.yaml")
    parser = OverridesParser.create()
    keys = {key for changes in experiments for key in changes}
    for changes, words in zip(experiments, presets.overrides(experiments, before), strict=True):
        read = {override.key_or_group: override.value() for override in parser.parse_overrides(words)}
        wanted = {key: changes.get(key, config.at(before, key)) for key in keys}
        assert {key: plain(value) for key, value in read.items()} == wanted


def plain(value):
    """Return Hydra's values as Python's."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return list(map(plain, value))
    return value.text if isinstance(value, QuotedString) else value


def test_an_experiment_sets_what_others_change(project):
    params = {"a": {"x": 1, "y": "it's"}}
    words = presets.overrides([{"a.x": 5}, {"a.y": [True, None, {"k": "v\\"}]}], params)
    assert words == [["a.x=5", "a.y='it\\'s'"], ["a.x=1", "a.y=[true,null,{k:'v\\\\'}]"]]


def test_listed_experiments_replace_those_of_the_base(project):
    (project / "presets" / "one.yaml").write_text(
        "base: digits-timesteps\nexperiments: [{train_fl.num_rounds: 3, sweep.seeds: [1]}, {train_fl.num_rounds: 4}]\n"
    )
    experiments = apply("one", project / "params.yaml").experiments
    assert experiments == [{"train_fl.num_rounds": 3, "sweep.seeds": [1]}, {"train_fl.num_rounds": 4}]


def test_command_lists_and_merges(project):
    listed = invoke(project, "preset")
    assert all(name in listed.output for name in SHIPPED)
    result = invoke(project, "preset", "digits-ablation")
    assert result.exit_code == 0 and "\nmethods.tdcl: added\n" in result.output
    assert config.load(project / "params.yaml").params.sweep.methods[:4] == ["fedavg", "tdcl", "ndcr", "feddifrc"]


def git(folder, *arguments):
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def test_uncommitted_edits_are_not_overwritten(project):
    params = project / "params.yaml"
    git(project, "init")
    git(project, "add", "params.yaml")
    assert invoke(project, "preset", "cifar10-layers").exit_code == 0  # over what git holds
    assert invoke(project, "preset", "digits-layers").exit_code == 0  # over what a preset holds
    params.write_text(params.read_text().replace("num_rounds: 20", "num_rounds: 21").replace("title: Fed", "title: x"))
    before = params.read_text()
    assert "num_rounds: 21" in before
    result = invoke(project, "preset", "digits-layers")
    assert result.exit_code == 1 and len(result.output.splitlines()) == 1
    assert f"would overwrite uncommitted edits in {params} (train_fl.num_rounds, report.title). Commit" in result.output
    assert params.read_text() == before
    git(project, "add", "params.yaml")
    assert invoke(project, "preset", "digits-layers").exit_code == 0
    params.write_text(before.replace("num_rounds: 21", "num_rounds: 22"))
    assert invoke(project, "preset", "digits-layers", "--force").exit_code == 0
    assert config.load(params).params.train_fl.num_rounds == 20


def test_edits_outside_the_preset_do_not_block_it(project):
    git(project, "init")
    git(project, "add", "params.yaml")
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("checkpoint_every: 10", "checkpoint_every: 3"))
    assert invoke(project, "preset", "digits-layers").exit_code == 0
    assert config.load(params).params.runtime.checkpoint_every == 3


def test_the_command_that_undoes_a_preset(project):
    params, old = project / "params.yaml", project / "params.yaml.old"
    before = params.read_text()
    assert f"to undo: mv {old} {params}\n" in invoke(project, "preset", "digits-layers").output  # no git
    assert "to undo" not in invoke(project, "preset", "digits-layers").output  # which changes nothing
    old.rename(params)
    assert params.read_text() == before
    git(project, "init")
    git(project, "add", "params.yaml")
    assert f"to undo: git checkout {params}\n" in invoke(project, "preset", "digits-layers").output
    git(project, "checkout", "params.yaml")
    assert params.read_text() == before and not old.exists()
    params.write_text(before.replace("num_rounds: ", "num_rounds: 1"))  # which git does not have
    assert f"to undo: mv {old} {params}\n" in invoke(project, "preset", "digits-layers", "--force").output
    assert old.read_text() == before.replace("num_rounds: ", "num_rounds: 1")


def test_a_second_preset_keeps_the_backup_of_the_first(project):
    params = project / "params.yaml"
    mine = params.read_text().replace("num_rounds: ", "num_rounds: 1")
    params.write_text(mine)
    invoke(project, "preset", "digits-layers")
    between = params.read_text()
    result = invoke(project, "preset", "guidance-weights")
    assert f"to undo: mv {params}.old2 {params}\n" in result.output
    assert (project / "params.yaml.old").read_text() == mine
    assert (project / "params.yaml.old2").read_text() == between


def test_dry_run_counts_runs_and_changes_nothing(project):
    before = {file: file.read_bytes() for file in project.rglob("*") if file.is_file()}
    result = invoke(project, "preset", "digits-table", "--dry-run")
    assert result.exit_code == 0 and "sweep.seeds: [0, 1, 2] -> [0, 1, 2, 3" in result.output
    assert result.output.endswith("federated runs: 560\n")  # 14 methods, 4 partitions, 10 seeds
    result = invoke(project, "preset", "digits-heterogeneity", "--dry-run")
    assert result.output.endswith("federated runs: 75 in 5 experiments\n")  # each: 3 methods, 1 partition, 5 seeds
    assert {file: file.read_bytes() for file in project.rglob("*") if file.is_file()} == before


def test_dry_run_of_a_preset_that_would_be_refused(project):
    git(project, "init")
    git(project, "add", "params.yaml")
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("num_rounds: ", "num_rounds: 1"))
    result = invoke(project, "preset", "digits-tuned", "--run", "--dry-run")
    assert result.exit_code == 0 and "federated runs: 150 in 2 experiments\n" in result.output
    assert f"would overwrite uncommitted edits in {params} (train_fl.num_rounds). Without --dry-run" in result.output


def test_experiments_need_a_git_repository(project):
    def refused():
        result = invoke(project, "preset", "digits-tuned", "--run")
        assert result.exit_code == 1 and len(result.output.splitlines()) == 1
        assert (project / "params.yaml").read_bytes() == before
        return result.output

    before = (project / "params.yaml").read_bytes()
    assert "need a git repository with a commit" in refused()
    git(project, "init")
    assert "`git init` and commit the project first" in refused()  # before the first commit
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    git(project, "add", "params.yaml")
    git(project, "commit", "-m", "x")
    assert "Run `dvc config --unset core.no_scm` first." in refused()


def test_a_description_is_the_whole_comment(project):
    (project / "presets" / "two.yaml").write_text("# a line\n# and another\n\n# not this\ntrain_fl: {num_rounds: 3}\n")
    assert presets.describe(project / "presets")["two"] == "a line and another"


def test_digits_presets_are_the_cifar10_ones_scaled_down(project):
    apply("digits-layers", project / "params.yaml")
    made = config.load(project / "params.yaml").params
    assert made.sweep.seeds == [0] and made.sweep.partitions == ["nid1_05"]
    assert made.methods["layers23"].layers == ["up_blocks.1", "up_blocks.2"]
    assert made.prepare_data.name == "digits" and made.train_fl.model == "small_cnn"


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_presets_of_the_protocol_have_the_papers_weights(project, name):
    apply(name, project / "params.yaml")
    made = config.load(project / "params.yaml")
    guided = [made.settings("methods", "feddifrc"), made.settings("methods", "fedprox-feddifrc").guidance]
    assert [(own.tdcl_weight, own.ndcr_weight) for own in guided] == [(1.0, 1.0), (1.0, 1.0)]


def test_what_is_shared_stays_so(project):
    apply("guidance-weights", project / "params.yaml")
    text = (project / "params.yaml").read_text()
    assert "    <<: &guidance\n" in text and "guidance: *guidance}" in text


def test_base_sets_every_key_that_its_presets_change():
    """A second preset replaces all keys of the first, and digits presets all keys of CIFAR-10 presets."""
    folder = REPOSITORY / "presets"
    digits, cifar10 = (config.read_yaml(folder / f"{name}.yaml") for name in ("digits", "cifar10"))
    assert {s: set(keys) for s, keys in digits.items()} == {s: set(keys) for s, keys in cifar10.items()}
    for file in folder.glob("*.yaml"):
        own = config.read_yaml(file)
        if "base" not in own:
            continue
        last = own["base"] if isinstance(own["base"], str) else own["base"][-1]
        base = config.read_yaml(folder / f"{last}.yaml")
        for section in set(own) - {"base", "sweep", "methods", "partitions", "report", "experiments"}:
            missing = set(own[section]) - set(base[section])
            assert not missing, f"{file.name}: {section} {missing}"


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to another user needs root")
def test_edits_are_kept_if_git_refuses_the_repository(project, monkeypatch):
    """Git refuses to read another user's repository, so nothing is known about its content."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    git(project, "init")
    git(project, "add", "params.yaml")
    for path in (project, project / ".git"):
        os.chown(path, 65534, 65534)
    before = (project / "params.yaml").read_bytes()
    result = invoke(project, "preset", "digits-layers")
    assert result.exit_code == 1 and "git cannot tell (fatal: detected dubious ownership" in result.output
    assert (project / "params.yaml").read_bytes() == before
    assert invoke(project, "preset", "digits-layers", "--force").exit_code == 0
