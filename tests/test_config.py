"""params.yaml and the flags over it: every mistake is one line with the place, the key, its value, what is allowed."""

import shutil
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.settings import config
from pipeline.settings.params import METHODS, Guidance
from tests.conftest import REPOSITORY, SMALL, invoke, write_params


@pytest.fixture
def params(tmp_path):
    """The repository's own params.yaml, and a function that replaces a piece of it."""
    file = tmp_path / "params.yaml"
    shutil.copy(REPOSITORY / "params.yaml", file)

    def edit(old, new):
        text = file.read_text()
        assert text.count(old) >= 1, old
        file.write_text(text.replace(old, new, 1))
        return file

    return edit


@pytest.fixture
def file(params):
    return params("", "")


def complaint(file, overrides=None):
    with pytest.raises(PipelineError) as caught:
        config.load(file, overrides)
    return str(caught.value).replace(str(file.parent) + "/", "")


def test_params_of_small_projects_are_the_repositorys_with_their_changes(tmp_path):
    """They are made line by line, without a parser."""
    changes = {"prepare_data.seed": 5, "methods.own": {"algorithm": "fedavg"}}
    written = config.read_yaml(write_params(tmp_path, changes))
    expected = config.read_yaml(REPOSITORY / "params.yaml")
    for dotted, value in {**SMALL, **changes}.items():
        section, key = dotted.split(".")
        expected[section][key] = value
    assert written == expected


def test_repositorys_own_file_is_valid(file):
    loaded = config.load(file)
    assert loaded.params.extract_features.timestep == 300
    assert loaded.params.train_fl.weight_decay == 1e-5
    assert loaded.dataset_dir == file.parent / "data" / "datasets" / "digits"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        # unknown keys, with the nearest known one or what is allowed
        (
            "  timestep: 300",
            "  timestep: 300\n  time_step: 1",
            "extract_features.time_step is not a known key; did you mean timestep?",
        ),
        ("report:\n", "reports: {}\nreport:\n", "reports is not a known key; did you mean report?"),
        ("report:\n", "xyz: {}\nreport:\n", "xyz is not a known key; allowed here: prepare_data, prepare_backbone,"),
        (
            "    algorithm: fedavg\n",
            "    algorithm: fedavg\n    xyz: 1\n",
            "methods.fedavg.xyz is not a known key; allowed here: algorithm",
        ),
        (
            "  moon: {",
            "  moon: {temprature: 1, ",
            "methods.moon.temprature is not a known key; did you mean temperature?",
        ),
        # missing ones
        ("  timestep: 300", "", "extract_features.timestep is missing"),
        ("  fedavg:\n    algorithm: fedavg\n", "  fedavg: {}\n", "methods.fedavg.algorithm is missing"),
        # integers wider than the arrays and manifests that they go into
        (
            "  rows_per_shard: 512",
            "  rows_per_shard: 9223372036854775808",
            "extract_features.rows_per_shard = 9223372036854775808: input should be less than 9223372036854775808",
        ),
        (
            "  dims: [256, 128, 128]",
            "  dims: [9223372036854775808]",
            "extract_features.dims = [9223372036854775808]: input",
        ),
        ("  seeds: [0, 1, 2]", "  seeds: [9223372036854775808]", "sweep.seeds = [9223372036854775808]: input should"),
        # wrong types
        ("  timestep: 300", "  timestep: yes", "extract_features.timestep = 'yes': input should be a valid integer"),
        ("  timestep: 300", "  timestep: true", "extract_features.timestep = True: input should be a valid integer"),
        ("  timestep: 300", "  timestep: 3.0", "extract_features.timestep = 3.0: input should be a valid integer"),
        ("  timestep: 300", "  timestep:", "extract_features.timestep = None: input should be a valid integer"),
        ("  name: digits ", "  name: 7 ", "prepare_data.name = 7: input should be a valid string"),
        ("  seeds: [0, 1, 2]", "  seeds: 0", "sweep.seeds = 0: input should be a valid list"),
        ("  seeds: [0, 1, 2]", "  seeds: [0, -1]", "sweep.seeds.1 = -1: input should be greater than or equal to 0"),
        (
            "  fedavg:\n    algorithm: fedavg\n",
            "  fedavg: 3\n",
            "methods.fedavg = 3: must be a section with its keys below it",
        ),
        # out of range
        (
            "  timestep: 300",
            "  timestep: 1000",
            "extract_features.timestep = 1000: input should be less than or equal to 999",
        ),
        (
            "  image_size: 32",
            "  image_size: 7",
            "prepare_data.image_size = 7: input should be greater than or equal to 8",
        ),
        ("  learning_rate: 0.01", "  learning_rate: 0", "train_fl.learning_rate = 0: input should be greater than 0"),
        (
            "  learning_rate: 0.01",
            "  learning_rate: .nan",
            "train_fl.learning_rate = nan: input should be a finite number",
        ),
        (
            "  learning_rate: 0.01",
            "  learning_rate: .inf",
            "train_fl.learning_rate = inf: input should be a finite number",
        ),
        ("  name: digits ", "  name: ../x ", "prepare_data.name = '../x': string should match pattern"),
        (
            "  broken_images: stop",
            "  broken_images: ignore",
            "prepare_data.broken_images = 'ignore': input should be 'stop' or 'skip'",
        ),
        (
            "    algorithm: fedavg\n",
            "    algorithm: fedavgg\n",
            "methods.fedavg.algorithm = 'fedavgg': input should be one of 'fedavg',",
        ),
        ("  fedavg:\n", "  fed.avg:\n", "methods.fed.avg is not a valid name: string should match pattern"),
        # one line a key, whatever it may be
        (
            "  negatives: all",
            "  negatives: some",
            "extract_features.negatives = 'some': input should be 'all' or input should be a valid integer",
        ),
        # the sweep's names
        (
            "  methods: [fedavg,",
            "  methods: [fedavgg,",
            "sweep.methods names fedavgg, which is not in methods. Use one of fedavg,",
        ),
        (
            "  partitions: [dir005,",
            "  partitions: [dir5,",
            "sweep.partitions names dir5, which is not in partitions. Use one of dir005,",
        ),
    ],
)
def test_invalid_key_is_reported_on_one_line(params, old, new, line):
    message = complaint(params(old, new))
    assert message.startswith(f"params.yaml: {line}")
    assert "\n" not in message


def test_two_invalid_keys_are_two_lines(params):
    params("  timestep: 300", "  timestep: -1")
    lines = complaint(params("  image_size: 32", "  imagesize: 32")).splitlines()
    assert lines == [
        "params.yaml: prepare_data.image_size is missing",
        "params.yaml: prepare_data.imagesize is not a known key; did you mean image_size?",
        "params.yaml: extract_features.timestep = -1: input should be greater than or equal to 0",
    ]


def test_missing_and_unknown_sections(params):
    file = params("report:\n", "sweeep: {}\nreport:\n")
    text = file.read_text()
    file.write_text(text.replace(text[text.index("partitions:  ") : text.index("federation:  ")], ""))
    lines = complaint(file).splitlines()
    assert lines == [
        "params.yaml: partitions is missing",
        "params.yaml: sweeep is not a known key; did you mean sweep?",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"", "params.yaml must hold sections (prepare_data, ...), but holds nothing"),
        (b"- a\n", "params.yaml must hold sections (prepare_data, ...), but holds a list"),
        (b"a: 1\n---\nb: 2\n", "params.yaml is not valid YAML (line 2: "),
        (b"a:\n  b: [1\nc: 2\n", "params.yaml is not valid YAML (line 3: expected ',' or ']'"),
        (b"a:\n\tb: 1\n", "params.yaml is not valid YAML (line 2: found character"),
        (b"a:\n  b: 1\n  b: 2\n", 'params.yaml is not valid YAML (line 3: found duplicate key "b"'),
        (
            b"a: !!python/object/apply:os.getcwd []\n",
            "params.yaml is not valid YAML (line 1: could not determine a constructor",
        ),
        (b"a: &x 1\nb: &x 2\n", "params.yaml is not valid YAML (found duplicate anchor 'x'"),
        (b"a: *nowhere\n", "params.yaml is not valid YAML (line 1: found undefined alias"),
        (b"a: \xff\n", "params.yaml is not UTF-8 text (invalid start byte at byte 3). Save it as UTF-8."),
        (b"a: \x00\n", "params.yaml is not valid YAML ("),
    ],
)
def test_invalid_yaml_is_reported_on_one_line(file, text, line):
    file.write_bytes(text)
    message = complaint(file)
    assert message.startswith(line)
    assert "\n" not in message


def test_missing_file_and_folder_are_reported(tmp_path):
    assert complaint(tmp_path / "nowhere.yaml").startswith("nowhere.yaml does not exist. Run in the project's folder")
    (tmp_path / "folder").mkdir()
    assert complaint(tmp_path / "folder") == "folder cannot be read (Is a directory). Name a file with --params."


def test_numbers_are_read_as_yaml_1_2(params):
    params("  learning_rate: 0.01", "  learning_rate: 1e-4")
    params("  weight_decay: 0.00001", "  weight_decay: 1E-3")
    loaded = config.load(params("  timestep: 300", "  timestep: 010"))  # no octal
    assert loaded.params.train_fl.learning_rate == 0.0001
    assert loaded.params.train_fl.weight_decay == 0.001
    assert loaded.params.extract_features.timestep == 10


def test_unquoted_no_is_text_as_in_yaml_1_2(params):
    assert config.load(params("  name: digits ", "  name: no ")).params.prepare_data.name == "no"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train_fl.num_rounds", "3", 3),
        ("train_fl.learning_rate", "1e-4", 0.0001),
        ("extract_features.up_block_indices", "[1, 2]", [1, 2]),
        ("extract_features.negatives", "5", 5),
        ("extract_features.negatives", "all", "all"),
        ("extract_features.denoise_prompt", "", ""),
        ("prepare_data.name", "007", "007"),
        ("prepare_data.path", "12", "12"),
        ("prepare_data.path", "a: b", "a: b"),
        ("prepare_data.path", "null", None),
        ("prepare_data.train_subset", "null", None),
        ("report.title", "2024-01-01", "2024-01-01"),
        ("report.title", "# [not YAML", "# [not YAML"),
        ("methods.feddifrc.temperature", "1e-2", 0.01),
        ("sweep.methods", "[fedavg]", ["fedavg"]),
        ("nowhere.known", "3", 3),
        ("nowhere", "x", "x"),
    ],
)
def test_command_line_value_is_parsed_by_the_type_of_its_key(key, text, value):
    read = config.parse_value(key, text)
    assert (read, type(read)) == (value, type(value))


def test_overrides_replace_the_files_values(file):
    loaded = config.load(
        file, {"train_fl.num_rounds": 3, "methods.feddifrc.temperature": 0.1, "prepare_data.path": "x"}
    )
    assert loaded.params.train_fl.num_rounds == 3
    assert loaded.params.methods["feddifrc"].temperature == 0.1
    assert loaded.params.train_fl.batch_size == config.load(file).params.train_fl.batch_size


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--image-size", "7"], "command line: prepare_data.image_size = 7: input should be greater than"),
        (["--image-size", ""], "command line: prepare_data.image_size = '': input should be a valid integer"),
        (["--set", "sweep.seeds=[1, -2]"], "command line: sweep.seeds.1 = -2: input should be greater than"),
        (["--set", "prepare_dat.seed=1"], "command line: prepare_dat is not a known key; did you mean prepare_data?"),
        (["--set", "prepare_data.sed=1"], "command line: prepare_data.sed is not a known key; did you mean seed?"),
        (["--set", "prepare_data=3"], "command line: prepare_data = 3: must be a section with its keys below it"),
        (["--set", "report.title.x=1"], "Cannot set report.title.x (title is a value, not a section). Check the key."),
        (["--set", "methods.new.algorithm=x"], "command line: methods.new.algorithm = 'x': input should be one of"),
    ],
)
def test_invalid_command_line_value_is_not_blamed_on_the_file(file, arguments, line):
    result = invoke(file.parent, "prepare-data", *arguments)
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert result.output.startswith(f"Error: {line}")
    assert not (file.parent / "data").exists()


@pytest.mark.parametrize("assignment", ["train_fl.num_rounds", "=3", ""])
def test_set_without_a_key_or_a_value(file, assignment):
    result = invoke(file.parent, "prepare-data", "--set", assignment)
    assert result.exit_code == 2
    assert "is not an assignment" in result.output


def test_settings_of_an_unknown_name(file):
    with pytest.raises(PipelineError, match=r"params.yaml has no methods\.nope\. Available: fedavg, fedprox, "):
        config.load(file).settings("methods", "nope")


def test_hint_lists_only_keys_of_the_chosen_algorithm(params):
    message = complaint(params("    algorithm: fedavg\n", "    algorithm: fedavg\n    tempreture: 1\n"))
    assert message == "params.yaml: methods.fedavg.tempreture is not a known key; allowed here: algorithm, guidance"


def test_override_does_not_change_other_users_of_a_yaml_alias(params):
    file = params("  simsiam:", "  moon-feddifrc: {algorithm: fedavg, guidance: *guidance}\n  simsiam:")
    changed = "methods.fedprox-feddifrc.guidance.temperature"
    methods = config.load(file, {changed: 0.1}).params.methods
    found = {name: getattr(methods[name], "guidance", methods[name]).temperature for name in (
        "fedprox-feddifrc", "moon-feddifrc", "feddifrc", "feddifrc-ssl"
    )}  # fmt: skip
    assert found == {"fedprox-feddifrc": 0.1, "moon-feddifrc": 0.04, "feddifrc": 0.04, "feddifrc-ssl": 0.04}


def test_two_runs_with_one_folder_are_rejected(params):
    params(
        "  dir005: {kind", "  ssl-dir005: {kind: iid}\n  dir005: {kind"
    )  # feddifrc-ssl on dir005, feddifrc on ssl-dir005
    assert complaint(params("", "")) == (
        "params.yaml: partitions: method feddifrc on partition ssl-dir005 and method feddifrc-ssl on partition dir005 "
        "would both be results/feddifrc-ssl-dir005. Rename one of them."
    )


def test_differing_keys_are_dotted():
    wanted = {"a": {"b": 1, "c": [1, 2], "d": {"e": None}}, "f": 0.1, "g": {"h": 1}}
    assert (
        config.differing_keys({"a": {"b": 1, "c": [1, 2], "d": {"e": None}, "x": 1}, "f": 0.1, "g": {"h": 1}}, wanted)
        == []
    )
    assert config.differing_keys({"a": {"b": 2, "c": [1], "d": None}, "g": {}}, wanted) == [
        "a.b",
        "a.c",
        "a.d",
        "f",
        "g.h",
    ]


def test_help_describes_allowed_values(file):
    words = " ".join(invoke(file.parent, "train-fl", "--help").output.split())
    assert "[small_cnn, resnet10, resnet18 or mobilenet_v2]" in words
    assert "[a number > 0 and <= 1]" in words and "[an integer >= 1 or null]" in words
    words = " ".join(invoke(file.parent, "extract-features", "--help").output.split())
    assert "[auto or [A, B, ...]]" in words and "[all or an integer >= 1]" in words
    assert "a list in quotes: '[A, B]'" in words


def test_list_of_methods_describes_every_key(file):
    listed = invoke(file.parent, "train-fl", "--list-methods")
    assert listed.exit_code == 0
    sections = dict(part.split(":\n", 1) for part in listed.output.strip().split("\n\n"))
    assert set(sections) == {*METHODS, "guidance of any method, and keys of feddifrc"}
    keys = {
        name: {line.split()[0] for line in text.splitlines() if line[:3].strip()} for name, text in sections.items()
    }
    assert keys["moon"] == {"contrastive_weight", "temperature"}  # the latter is also a key of the guidance
    assert keys["feddifrc-self-supervised"] == {"knn_neighbours"} and keys["feddifrc"] == {"no"}  # "no keys of its own"
    assert keys["guidance of any method, and keys of feddifrc"] == set(Guidance.model_fields)
    words = " ".join(sections["moon"].split())
    assert "temperature its temperature (T). [a number > 0; default 0.5]" in words


def test_help_shows_examples_line_by_line(file):
    lines = invoke(file.parent, "prepare-data", "--help").output.splitlines()
    assert "    pipeline prepare-data" in lines and "  Examples:" in lines
    assert "    pipeline extract-features" in invoke(file.parent, "--help").output.splitlines()


@pytest.mark.parametrize(
    ("change", "expected", "flags"),
    [
        (
            {"train_fl": {"num_rounds": 3}},
            "train_fl.num_rounds 3, but params.yaml has",
            "--set train_fl.num_rounds=3",
        ),
        (
            {"dataset": {"name": "it's; rm"}},
            "prepare_data.name it's; rm, but",
            """--set 'prepare_data.name=it'"'"'s; rm'""",
        ),
        ({"dataset": {"name": "\x1b[2J"}}, "prepare_data.name \\x1b[2J, but", None),
        ({"train_fl": None}, "train_fl null, but", None),
        ({"method": {"algorithm": ...}}, "methods.fedavg.algorithm nothing, but", None),
    ],
)
def test_run_with_other_settings_is_rejected_with_both_values_and_the_flags_for_it(change, expected, flags):
    here = config.load(REPOSITORY / "params.yaml")
    run = here.settings_of_run("fedavg", "dir05")
    for section, values in change.items():
        changed = {k: v for k, v in (run[section] | (values or {})).items() if v is not ...}
        run[section] = changed if values else None
    with pytest.raises(PipelineError) as refused:
        here.check_settings_of_run(Path("results/x"), run, "fedavg", "dir05")
    assert expected in str(refused.value) and "\x1b" not in str(refused.value)
    assert flags is None or str(refused.value).endswith(f"or report it unchanged with {flags}.")
    assert ("report it unchanged" in str(refused.value)) == ("--set" in str(refused.value))


@pytest.mark.parametrize("below", ["", "sub/project"])
def test_path_is_found_in_dvcs_copy_before_the_project(tmp_path, monkeypatch, below):
    """An experiment's copy of a project is below .dvc/tmp of the real one; the project may be a part of DVC's."""
    copied = tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1"
    here, there = copied / below, tmp_path / below
    for folder in (here, there, copied / ".dvc"):
        folder.mkdir(parents=True, exist_ok=True)
    write_params(here, {})
    (there / "only-there").touch()
    for folder in (here, there):
        (folder / "both").touch()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    experiment = config.load(here / "params.yaml")
    assert experiment.path("both") == here / "both"
    assert experiment.path("only-there") == there / "only-there"
    assert experiment.places("nowhere") == [here / "nowhere", there / "nowhere"]
    assert experiment.backbone_dir == there / "models" / "tiny-sd" and experiment.features_dir.is_relative_to(here)
    write_params(there, {})
    workspace = config.load(there / "params.yaml")
    assert workspace.home == there and workspace.places("nowhere") == [there / "nowhere"]


def test_other_project_under_a_dvc_stage_has_its_own_home(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "project"))
    assert config.load(write_params(tmp_path / "other", {})).home == tmp_path / "other"


def test_a_path_may_start_at_home_or_with_a_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("IMAGES", "/srv/images")
    project = config.load(write_params(tmp_path, {}))
    assert project.path("~/cifar10") == Path("/home/someone/cifar10")
    assert project.path("$IMAGES/cifar10") == project.path("${IMAGES}/cifar10") == Path("/srv/images/cifar10")
    assert project.path("raw/cifar10") == tmp_path / "raw" / "cifar10"
    assert project.path("x" * 1000) == tmp_path / ("x" * 1000)  # too long for a file system
