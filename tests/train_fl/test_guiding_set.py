"""Training from a received feature set: mismatches name both sides on one line; only needed rows are read."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pipeline.data import datasets
from pipeline.data.datasets import Source
from pipeline.errors import PipelineError
from pipeline.feature_store import FeatureSet
from pipeline.io import atomic
from stages import prepare_data
from stages.train_fl import feature_check, run
from tests.train_fl import tiny_project

ROUND = {"train_fl__num_rounds": 1}


def error_of_training(project, *names: str, method: str = "feddifrc") -> str:
    """Return the one-line error of training, which contains all of `names`."""
    with pytest.raises(PipelineError) as caught:
        run(project, method, "iid", 0)
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert name in message, message
    return message


@pytest.fixture
def project(tmp_path):
    return tiny_project.make(tmp_path, **ROUND)


def test_another_data_set_is_reported_with_hashes_and_sizes(project):
    tiny_project.add_features(project)
    before = datasets.PreparedDataset(project.dataset_dir).hash
    splits = {"train": tiny_project.images(45, 0), "test": tiny_project.images(24, 1)}
    datasets.write(project.dataset_dir, "tiny", "test", Source(tiny_project.CLASSES, splits, "none", ["left", "right"]))
    after = datasets.PreparedDataset(project.dataset_dir).hash
    error_of_training(
        project, f"(48 images, hash {before[:12]})", f"(45 images, hash {after[:12]})", "Prepare the data set"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["round", "flat", "square"], "class 1 is 'square' in {set} and 'flat' in {data}, the same classes in another"),
        (["round", "square", "oval"], "class 2 is 'flat' in {set} and 'oval' in {data}. Prepare"),
        (["round", "square", "flat", "oval"], "{set} was extracted for 3 classes and {data} has 4"),
    ],
)
def test_different_class_names_and_order_are_reported(project, names, message):
    tiny_project.add_features(project)
    file = project.dataset_dir / "manifest.json"
    atomic.write_json(file, json.loads(file.read_text()) | {"class_names": names})
    error_of_training(project, message.format(set=project.features_dir, data=project.dataset_dir))


SETTINGS = [
    ({"image_size": 16}, "image_size 16", "image_size 32"),
    ({"denoise_prompt": "a photo"}, "denoise_prompt 'a photo'", "denoise_prompt ''"),
    ({"negatives": 2}, "negatives 2", "negatives 'all'"),
    ({"noise_seed": 1}, "noise_seed 1", "noise_seed 0"),
    ({"dtype": "bfloat16"}, "dtype 'bfloat16'", "dtype 'float32'"),
    ({"storage": "int8"}, "storage 'int8'", "storage 'float16'"),
    ({"extraction_version": 7}, "version 7", "version 1"),
    ({"timestep": 200}, "timestep 200", "timestep 300"),
    ({"basis_images": 4}, "basis_images 4", "basis_images 1000"),
    ({"positive": "first"}, "prompts 'self-supervised'", "prompts 'class'"),
    ({"timestep": 200, "dtype": "float16"}, "timestep 200, dtype 'float16'", "timestep 300, dtype 'float32'"),
]


@pytest.mark.parametrize(("theirs", "set_values", "our_values"), SETTINGS)
def test_different_settings_are_reported_with_the_way_to_accept_the_set(project, theirs, set_values, our_values):
    tiny_project.add_features(project, **theirs)  # copied over ours
    message = error_of_training(
        project, "Give params.yaml the set's values to use it, or run `pipeline extract-features --overwrite`."
    )
    set_side, our_side = message.split(", but extract_features here has ")
    assert set_side.endswith(f"was extracted with {set_values}")
    assert our_side.startswith(our_values)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ],
)
def test_set_is_accepted_with_matching_params_yaml(tmp_path, theirs, ours):
    project = tiny_project.make(tmp_path, **ROUND)
    tiny_project.add_features(project, **theirs)
    error_of_training(project, *(f"was extracted with {key} {value!r}, but" for key, value in ours.items()))
    changes = {f"extract_features__{key}": value for key, value in ours.items()}
    run(tiny_project.make(tmp_path, **changes, **ROUND), "feddifrc", "iid", 0)


# Prompts, bases and image encoders that files hold


def open_checked(project):
    feature_check.open_checked(project, datasets.PreparedDataset(project.dataset_dir))


def assert_rejected(project, *names):
    with pytest.raises(PipelineError) as caught:
        open_checked(project)
    for name in names:
        assert name in str(caught.value), str(caught.value)


OWN = {"class_prompts": "flat: as flat as can be\nround: [a ball, a disc]\n", "negative_words": "cat\ndog\n"}
KIND = {"class_prompts": "class", "negative_words": "self-supervised"}
EDITED = {"class_prompts": "flat: as flat as can be\nround: [a ball]\n", "negative_words": "cow\ndog\n"}


@pytest.mark.parametrize(
    ("key", "theirs", "ours", "texts", "message"),
    [
        # our file is here: the texts are compared
        ("class_prompts", "own.txt", "own.txt", OWN, None),
        ("class_prompts", "copy.txt", "own.txt", OWN, None),
        ("negative_words", "own.txt", "own.txt", OWN, None),
        ("class_prompts", "own.txt", "own.txt", EDITED, "prompt 0 ['a ball', 'a disc'], but extract_features here has"),
        ("negative_words", "own.txt", "own.txt", EDITED, "prompt 1 ['a photo of a cat'], but extract_features here"),
        ("class_prompts", None, "own.txt", OWN, "class_prompts null, but extract_features here has class_prompts"),
        ("class_prompts", "own.txt", None, OWN, "class_prompts 'own.txt', but extract_features here has class_prompts"),
        # our file is not here: only settings are compared, and not which file
        ("class_prompts", "own.txt", "own.txt", None, None),
        ("class_prompts", "own.txt", "other.txt", None, None),
        ("negative_words", "own.txt", "other.txt", None, None),
        ("class_prompts", None, "own.txt", None, "class_prompts null, but extract_features here has class_prompts"),
        ("negative_words", None, "own.txt", None, "negative_words null, but extract_features here has negative_words"),
    ],
)  # fmt: skip
def test_prompts_from_a_present_file_are_compared_by_text(tmp_path, key, theirs, ours, texts, message):
    settings = {"extract_features__prompts": KIND[key], "extract_features__negative_words": None}
    for name in ("own.txt", "copy.txt"):
        (tmp_path / name).write_text(OWN[key])
    maker = tiny_project.make(tmp_path, **settings | {f"extract_features__{key}": theirs})
    tiny_project.add_features(maker, settings={})
    (tmp_path / "own.txt").unlink()
    if texts:
        (tmp_path / "own.txt").write_text(texts[key])
    project = tiny_project.make(tmp_path, **settings | {f"extract_features__{key}": ours})
    if message:
        assert_rejected(project, f"was extracted with {message}")
    else:
        open_checked(project)


def test_settings_of_self_supervised_prompts_are_compared(tmp_path):
    settings = {"extract_features__prompts": "self-supervised"}
    tiny_project.add_features(tiny_project.make(tmp_path, **settings), settings={})
    open_checked(tiny_project.make(tmp_path, **settings))
    changed = settings | {"extract_features__self_supervised_prompt": "a thing"}
    assert_rejected(
        tiny_project.make(tmp_path, **changed), "with self_supervised_prompt 'a photo of a similar object', but"
    )
    changed = settings | {"extract_features__prompt_templates": ["the {class_name}"]}
    assert_rejected(tiny_project.make(tmp_path, **changed), "with prompt_templates ['a photo of a {class_name}'], but")


def test_set_without_settings_is_compared_by_its_content(tmp_path):
    tiny_project.add_features(tiny_project.make(tmp_path))
    open_checked(tiny_project.make(tmp_path))
    changed = tiny_project.make(tmp_path, extract_features__prompt_templates=["the {class_name}"])
    assert_rejected(
        changed, "with prompt 0 ['a photo of a round'], but extract_features here has prompt 0 ['the round']"
    )
    open_checked(tiny_project.make(tmp_path, extract_features__class_prompts="nowhere"))  # its texts are unknown here


def test_basis_file_is_compared_if_present(tmp_path):
    file = tmp_path / "shared.h5"
    file.write_bytes(b"a basis")
    theirs = {"basis_images": None, "basis_sha256": hashlib.sha256(b"a basis").hexdigest()}
    tiny_project.add_features(tiny_project.make(tmp_path), **theirs)
    start = f"with a PCA basis from a file (SHA-256 {theirs['basis_sha256'][:12]}), but extract_features.basis here is "
    assert_rejected(tiny_project.make(tmp_path), f"{start}auto. Set the key to the file that the set was made with")
    project = tiny_project.make(tmp_path, extract_features__basis="shared.h5")
    open_checked(project)
    file.write_bytes(b"another")
    assert_rejected(project, f"{start}shared.h5 (SHA-256 {hashlib.sha256(b'another').hexdigest()[:12]}). Set the key")
    file.unlink()
    open_checked(project)


def test_image_encoder_is_compared_if_present(tmp_path):
    theirs = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    tiny_project.add_features(tiny_project.make(tmp_path), image_conditioning=theirs)
    start = "with an image encoder, but extract_features.image_conditioning here is "
    assert_rejected(tiny_project.make(tmp_path), f"{start}null. Set the key to the file that the set was made with")
    project = tiny_project.make(tmp_path, extract_features__image_conditioning="clip")
    open_checked(project)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"weights")
    open_checked(project)
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"others")
    assert_rejected(project, f"{start}{tmp_path / 'clip'}, whose files differ. Set the key")
    tiny_project.add_features(tiny_project.make(tmp_path), timestep=300)
    assert_rejected(
        project, "with image_conditioning null, but extract_features here has image_conditioning 'clip'. Give params"
    )


def test_different_layers_and_dims_are_reported(tmp_path):
    project = tiny_project.make(tmp_path, extract_features__layers=["up_blocks.3"], **ROUND)
    tiny_project.add_features(project)
    error_of_training(project, "with layers ['up_blocks.1']", "layers ['up_blocks.3']")
    error_of_training(tiny_project.make(tmp_path, extract_features__dims=[4], **ROUND), "with dims [6]", "dims [4]")
    error_of_training(
        tiny_project.make(tmp_path, extract_features__dims=[6, 4], **ROUND), "with dims [6]", "dims [6, 4]"
    )
    # as many dims as the layer has channels is all there can be
    run(tiny_project.make(tmp_path, extract_features__dims=[256], **ROUND), "feddifrc", "iid", 0)


def test_missing_layer_of_a_method_is_reported(tmp_path):
    project = tiny_project.make(tmp_path, **{"methods.feddifrc__layers": ["up_blocks.2"]}, **ROUND)
    tiny_project.add_features(project)
    error_of_training(project, "guidance.layers names up_blocks.2, but the feature set has up_blocks.1")


def test_another_frozen_model_is_reported_and_an_absent_one_accepted(project):
    tiny_project.add_features(project, backbone={"unet/config.json": "a" * 64})
    run(project, "feddifrc", "iid", 0)  # the model's manifest is not here
    project.backbone_manifest.parent.mkdir(parents=True)
    ours = {"name": "tiny-sd", "source": "embedded", "revision": None}
    files = {"unet/config.json": "a" * 64, "model_index.json": "c" * 64}
    atomic.write_json(project.backbone_manifest, ours | {"files": files})
    run(project, "feddifrc", "iid", 0)
    atomic.write_json(project.backbone_manifest, ours | {"files": files | {"unet/config.json": "b" * 64}})
    error_of_training(
        project, "another frozen model", str(project.backbone_manifest), "source embedded", "unet/config.json"
    )


def test_edited_manifest_is_reported(project):
    tiny_project.add_features(project, timestep=200)
    file = project.features_dir / "manifest.json"
    text = file.read_text().replace('"timestep": 200', '"timestep": 300')
    file.unlink()  # staging holds the same file
    file.write_text(text)
    error_of_training(project, "manifest.json was changed (its fingerprint does not match its content)")


def test_supervised_method_rejects_self_supervised_prompts(tmp_path):
    project = tiny_project.make(tmp_path, extract_features__prompts="self-supervised", **ROUND)
    tiny_project.add_features(project)
    error_of_training(project, "self-supervised prompts, which name no class, but feddifrc trains with labels")


def test_equal_features_under_two_prompts_are_rejected_only_with_tdcl(tmp_path):
    project = tiny_project.make(tmp_path, methods__feddifrc__tdcl_weight=0.0, **ROUND)
    tiny_project.add_features(project, same=(0, 2))
    assert run(project, "feddifrc", "iid", 0)
    project = tiny_project.make(tmp_path, **ROUND)
    names = [text for (text,) in FeatureSet(project.features_dir).manifest.content.prompts]
    error_of_training(project, f"equal features under the prompts {names[0]!r} and {names[2]!r}", "tdcl_weight to 0")


# Only needed shards and rows


@pytest.fixture
def blocks(tmp_path):
    """Domain 0 is the first 16 images, in shard 0 of three; the client of `near` holds half of domain 0."""
    partitions = {
        "near": {"kind": "domain", "clients_per_domain": [1, 0], "samples_fraction": 0.5},
        "iid": {"kind": "iid"},
    }
    project = tiny_project.make(tmp_path, partitions=partitions, **ROUND)
    splits = {"train": tiny_project.images(48, 0), "test": tiny_project.images(24, 1)}
    splits["train"].domains[:] = (np.arange(48) >= 16).astype(np.int64)
    datasets.write(project.dataset_dir, "tiny", "test", Source(tiny_project.CLASSES, splits, "none", ["left", "right"]))
    tiny_project.add_features(project)
    return project


def test_run_needs_only_the_shards_of_its_rows(blocks):
    expected = (run(blocks, "feddifrc", "near", 0) / "model.safetensors").read_bytes()
    for shard in (1, 2):
        (blocks.features_dir / f"shard-0000{shard}.h5").unlink()
    assert (run(blocks, "feddifrc", "near", 0) / "model.safetensors").read_bytes() == expected
    here = blocks.features_dir
    with pytest.raises(PipelineError, match="lacks shard-00001.h5, shard-00002.h5 of the 3 shards") as caught:
        run(blocks, "feddifrc", "iid", 0)
    command = str(caught.value).partition("`dvc pull ")[2].rstrip("`.").split()
    assert [name.rpartition("/")[2] for name in command] == ["shard-00001.h5", "shard-00002.h5"]
    assert all(name.endswith(f"{here.name}/shard-0000{k}.h5") for k, name in enumerate(command, 1))


def test_run_reads_only_the_rows_it_needs(blocks):
    needed = set(sum(json.loads((run(blocks, "feddifrc", "near", 0) / "partition.json").read_text())["clients"], []))
    assert 0 < len(needed) < 16  # half of domain 0
    damaged = min(set(range(16)) - needed)
    _flip_row(blocks.features_dir / "shard-00000.h5", FeatureSet(blocks.features_dir), damaged)
    run(blocks, "feddifrc", "near", 0)
    _flip_row(blocks.features_dir / "shard-00000.h5", FeatureSet(blocks.features_dir), min(needed))
    with pytest.raises(PipelineError, match=f"shard-00000.h5: row {min(needed)} is corrupt"):
        run(blocks, "feddifrc", "near", 0)


def _flip_row(file, features, row):
    """Flip a bit of one row's denoised features, found by its bytes."""
    needle = features.read(np.array([row])).denoised.tobytes()
    data = bytearray(file.read_bytes())
    data[data.index(needle)] ^= 1
    file.unlink()
    file.write_bytes(data)


def test_missing_basis_or_truncated_shard_is_reported(blocks):
    shard = blocks.features_dir / "shard-00001.h5"
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-1])
    with pytest.raises(PipelineError, match="shard-00001.h5 has"):
        run(blocks, "feddifrc", "near", 0)
    shard.unlink()
    (blocks.features_dir / "basis.h5").unlink()
    with pytest.raises(PipelineError, match="basis.h5 is missing"):
        run(blocks, "feddifrc", "near", 0)


def test_many_missing_shards_are_reported_on_one_short_line(blocks):
    features = FeatureSet(blocks.features_dir, partial=True)
    entry = features.manifest.shards[1]
    features._absent = {k: entry.model_copy(update={"file": f"shard-{k:05d}.h5"}) for k in range(20)}
    with pytest.raises(PipelineError, match=r"lacks shard-00000.h5 and 19 more .*`dvc pull \S*tiny-tiny-sd-t300`"):
        features.require(np.arange(0, 400, 20))


# A received set with an own copy of the images


def folder_of_images(root):
    for split, count in (("train", 4), ("test", 2)):
        for number, name in enumerate(("flat", "round", "square")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = np.random.default_rng([number, k, split == "test"]).integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}.png")
    return root


def test_received_set_fits_an_own_copy_of_the_images(tmp_path):
    projects = {}
    for member in ("a", "b"):
        images, root = folder_of_images(tmp_path / f"{member}s_images"), tmp_path / member
        root.mkdir()
        settings = {"prepare_data__source": "folder", "prepare_data__path": str(images), "train_fl__num_clients": 2}
        projects[member] = tiny_project.make(root, **settings, **ROUND)
        prepare_data.run(projects[member])
    a, b = projects.values()
    tiny_project.add_features(a)
    shutil.copytree(a.features_dir, b.features_dir)  # all that B gets of A
    first, second = (run(project, "feddifrc", "iid", 0) for project in (a, b))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    (tmp_path / "bs_images" / "train" / "flat" / "3.png").unlink()
    prepare_data.run(b)
    error_of_training(b, "(12 images, hash ", "(11 images, hash ")
