"""Models from a hub on loopback: what is fetched, rejected and kept."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from pipeline.diffusion import backbones
from pipeline.errors import PipelineError
from pipeline.settings import config
from stages.prepare_backbone import run
from tests.conftest import REPOSITORY, write_params
from tests.extract_features import tiny_models
from tests.prepare_backbone.hub_server import COMMIT, digests
from tests.prepare_backbone.test_tiny_sd import SHIPPED

UNET = "unet/diffusion_pytorch_model.safetensors"
WEIGHTS = ["text_encoder/model.safetensors", UNET, "vae/diffusion_pytorch_model.safetensors"]


@pytest.fixture
def model(hub):
    return hub.root / "org" / "model"


def prepare(root, source="org/model", revision=COMMIT, **settings):
    changes = {"prepare_backbone.name": "m", "prepare_backbone.source": source, "prepare_backbone.revision": revision}
    loaded = config.load(
        write_params(root, changes | {key.replace("__", "."): value for key, value in settings.items()})
    )
    return json.loads(run(loaded).read_text()), loaded.backbone_dir


def rename(model, name, other):
    (model / name).rename(model / other)


def half(name):
    return name.replace(".safetensors", ".fp16.safetensors")


def test_each_file_is_fetched_once_and_linked(tmp_path, hub, model):
    manifest, folder = prepare(tmp_path)
    assert hub.weights() == WEIGHTS
    assert (manifest["source"], manifest["revision"], manifest["variant"]) == ("org/model", COMMIT, None)
    assert manifest["files"] == {name: digests(model / name)[0] for name in manifest["files"]}
    assert (folder / UNET).is_symlink() and (tmp_path / "cache") in (folder / UNET).readlink().parents
    prepare(tmp_path)
    assert hub.weights() == WEIGHTS


@pytest.mark.parametrize(
    ("dtype", "variant", "fp16"),
    [("float32", "auto", False), ("bfloat16", "auto", True), ("float32", "fp16", True), ("float16", "none", False)],
)
def test_variant_follows_the_dtype(tmp_path, hub, model, dtype, variant, fp16):
    for name in WEIGHTS:
        shutil.copy(model / name, model / half(name))
    settings = {"extract_features__dtype": dtype, "prepare_backbone__variant": variant}
    manifest, _ = prepare(tmp_path, **settings)
    assert hub.weights() == [half(name) if fp16 else name for name in WEIGHTS]
    assert manifest["variant"] == ("fp16" if fp16 else None) and UNET in manifest["files"]


def test_repository_with_only_fp16_weights(tmp_path, hub, model):
    for name in WEIGHTS:
        rename(model, name, half(name))
    assert set(WEIGHTS) <= prepare(tmp_path)[0]["files"].keys()
    with pytest.raises(PipelineError, match="has unet only as fp16. Set prepare_backbone.variant to auto"):
        prepare(tmp_path, prepare_backbone__variant="none")


def test_shards_of_another_variant_are_neither_fetched_nor_hashed(tmp_path, hub, model):
    (model / "text_encoder" / "model.fp16-00001-of-00002.safetensors").write_bytes(b"x")
    (model / "text_encoder" / "model.safetensors.index.fp16.json").write_text("{}")
    manifest, _ = prepare(tmp_path)
    assert hub.weights() == WEIGHTS and not any("fp16" in name for name in manifest["files"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"gated": 401},
            r"org/model is gated. Accept its terms at http://.*/org/model, then log in with `hf auth login`",
        ),
        ({"gated": 403}, "the account of your token has no access"),
        ({"private": True}, "The hub has no model org/model, or it is private"),
    ],
)
def test_error_of_the_hub_says_what_to_do(tmp_path, hub, fault, message):
    hub.faults = fault
    with pytest.raises(PipelineError, match=message):
        prepare(tmp_path)
    assert hub.weights() == []


def test_wrong_commit_keeps_the_previous_model(tmp_path, hub):
    _, folder = prepare(tmp_path)
    with pytest.raises(PipelineError, match="org/model has no revision dddd"):
        prepare(tmp_path, revision="d" * 40)
    assert (folder / UNET).is_file()


@pytest.mark.parametrize("source", ["org/model", "org/model@main", "{url}/org/model", "{url}/org/model/tree/main"])
def test_branch_is_rejected_with_its_commit(tmp_path, hub, source):
    with pytest.raises(PipelineError, match=f"main is now at {COMMIT}"):
        prepare(tmp_path, source=source.format(url=hub.url), revision=None)


@pytest.mark.parametrize("source", ["org/model@{commit}", "{url}/org/model/commit/{commit}"])
def test_commit_may_be_part_of_the_source(tmp_path, hub, source):
    manifest, _ = prepare(tmp_path, source=source.format(url=hub.url, commit=COMMIT), revision=None)
    assert (manifest["source"], manifest["revision"]) == ("org/model", COMMIT)


def test_download_with_a_flipped_bit_is_rejected(tmp_path, hub, model):
    hub.faults = {"corrupt": UNET}
    with pytest.raises(PipelineError, match=f"{UNET} of .* differs from the hash that the hub lists"):
        prepare(tmp_path)
    assert not list((tmp_path / "cache").glob(f"*/blobs/{digests(model / UNET)[0]}*"))
    hub.faults = {}
    prepare(tmp_path)


def test_damaged_file_in_the_cache_is_downloaded_again(tmp_path, hub, model):
    manifest, folder = prepare(tmp_path)
    blob = (folder / UNET).resolve()
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])
    assert prepare(tmp_path)[0] == manifest
    assert (folder / UNET).read_bytes() == (model / UNET).read_bytes()


def test_unreachable_hub_falls_back_to_the_checked_cache(tmp_path, hub, monkeypatch):
    manifest, folder = prepare(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert prepare(tmp_path)[0] == manifest
    blob = (folder / UNET).resolve()
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])
    with pytest.raises(
        PipelineError, match=f"{UNET} of .* is damaged in the cache.*Run again with a network connection"
    ):
        prepare(tmp_path)


def test_same_files_are_selected_without_the_hub(tmp_path, hub, model, monkeypatch):
    shutil.copy(model / WEIGHTS[0], model / half(WEIGHTS[0]))
    full = prepare(tmp_path)[0]
    half_wanted = {"extract_features__dtype": "bfloat16"}
    mixed = prepare(tmp_path, **half_wanted)[0]  # the text encoder alone has fp16
    assert mixed["variant"] == "fp16" and full["variant"] is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert prepare(tmp_path, **half_wanted)[0] == mixed and prepare(tmp_path)[0] == full
    shutil.rmtree(tmp_path / ".pipeline")
    with pytest.raises(PipelineError, match="list of files is not available. Run once with a network connection"):
        prepare(tmp_path, **half_wanted)


@pytest.mark.parametrize("linked", [False, True])
def test_source_inside_the_replaced_folder_is_rejected(tmp_path, linked):
    folder = tmp_path / "models" / "m"
    shutil.copytree(SHIPPED, folder)
    source = folder
    if linked:
        source = tmp_path / "other"
        source.symlink_to(folder)
    with pytest.raises(PipelineError, match="which would be replaced. Move the model to another folder"):
        prepare(tmp_path, source=str(source), revision=None)
    assert (folder / UNET).read_bytes() == (SHIPPED / UNET).read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a complete safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a git-lfs pointer"),
        ((SHIPPED / UNET).read_bytes()[:-1], "is not a complete safetensors file"),
    ],
)
def test_invalid_directory_keeps_the_previous_model(tmp_path, content, message):
    prepare(tmp_path, source="embedded", revision=None)
    shutil.copytree(SHIPPED, tmp_path / "other")
    (tmp_path / "other" / UNET).write_bytes(content)
    with pytest.raises(PipelineError, match=message):
        prepare(tmp_path, source="other", revision=None)
    assert (tmp_path / "models" / "m" / UNET).read_bytes() == (SHIPPED / UNET).read_bytes()


def test_full_disk_is_named_when_the_shipped_model_is_copied(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(PipelineError, match=r"m cannot be written \(No space left on device\). Make room on the disk"):
        prepare(tmp_path, source="embedded", revision=None)
    assert not list((tmp_path / "models").iterdir())


def test_broken_connection_is_retried(tmp_path, hub, model):
    hub.faults = {"drop": UNET}
    manifest, _ = prepare(tmp_path)
    assert manifest["files"][UNET] == digests(model / UNET)[0]


def test_leftovers_of_a_killed_download_are_removed(tmp_path, hub, model):
    prepare(tmp_path)
    blobs = next((tmp_path / "cache").glob("*/blobs"))
    leftovers = [
        blobs / f"{blob}.abc.incomplete" for blob in (digests(model / UNET)[0], "0" * 64)
    ]  # another variant's too
    for leftover in leftovers:
        leftover.touch()
    prepare(tmp_path)
    assert not any(leftover.exists() for leftover in leftovers)


def test_bin_weights_are_rejected_before_any_download(tmp_path, hub, model):
    rename(model, UNET, "unet/diffusion_pytorch_model.bin")
    with pytest.raises(PipelineError, match="but diffusion_pytorch_model.bin, which may contain code. Convert it with"):
        prepare(tmp_path)
    assert hub.weights() == []


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"in_channels": 9}, "takes 9 channels, as a model for inpainting, but the VAE gives 4"),
        ("unet", {"in_channels": 8}, "takes 8 channels"),
        ("unet", {"class_embed_type": "projection"}, "class_embed_type projection"),
        ("unet", {"num_class_embeds": 1000}, "num_class_embeds 1000"),
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type image"),
        ("unet", {"cross_attention_dim": 96}, "cross_attention_dim 96, but its text encoders give 64"),
    ],
)
def test_unet_with_other_inputs_is_rejected(tmp_path, hub, model, part, changes, message):
    file = model / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(PipelineError, match=message):
        prepare(tmp_path)
    assert hub.weights() == []


@pytest.mark.parametrize(
    ("family", "layers"),
    [("flux", ["transformer_blocks.1", "single_transformer_blocks.0"]), ("sana", ["transformer_blocks.3"])],
)
def test_newer_families_come_from_the_hub_and_are_loaded(tmp_path, hub, family, layers):
    published = tiny_models.FAMILIES[family](hub.root / "org" / family)
    manifest, folder = prepare(tmp_path, f"org/{family}")
    parts = {file.parent.name for file in published.rglob("*.safetensors")}
    assert {name.split("/")[0] for name in manifest["files"] if name.endswith(".safetensors")} == parts
    backbone = backbones.load(folder, layers, "cpu", torch.float32)
    conditioning = backbone.encode_prompts(["a cat"])
    noisy = torch.zeros(1, *backbone.latent_shape(64))
    assert list(backbone.features(noisy, 300, conditioning)) == layers


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("flux", {"in_channels": 128}, "takes 128 channels, but the VAE gives 64"),  # Control: the image beside it
        ("flux", {"joint_attention_dim": 32}, "joint_attention_dim 32, but its text encoders give 24"),
        ("flux", {"pooled_projection_dim": 32}, "pooled_projection_dim 32, but its text encoders give 16"),
        ("sana", {"guidance_embeds": True}, "a Sana that was distilled for few steps"),
        ("sana", {"caption_channels": 32}, "caption_channels 32, but its text encoders give 16"),
        ("sana", {"in_channels": 16}, "takes 16 channels, but the VAE gives 8"),
    ],
)
def test_transformer_with_other_inputs_is_rejected(tmp_path, hub, family, changes, message):
    published = tiny_models.FAMILIES[family](hub.root / "org" / family)
    file = published / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(PipelineError, match=message):
        prepare(tmp_path, f"org/{family}")
    assert hub.weights() == []


def test_lora_without_its_model_is_rejected(tmp_path, hub, model):
    shutil.rmtree(model)
    model.mkdir()
    (model / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    with pytest.raises(PipelineError, match="holds only LoRA weights"):
        prepare(tmp_path)


def test_directory_with_only_fp16_weights_and_an_unused_revision(tmp_path, hub, model, caplog):
    for name in WEIGHTS:
        rename(model, name, half(name))
    rename(model, half(WEIGHTS[0]), "text_encoder/model.fp16-00001-of-00001.safetensors")
    manifest, folder = prepare(tmp_path, source=str(model))
    assert (manifest["source"], manifest["revision"], manifest["variant"]) == ("model", None, "fp16")
    assert set(WEIGHTS) <= manifest["files"].keys() and "revision is not used" in caplog.text
    assert (folder / WEIGHTS[0]).readlink() == model / "text_encoder/model.fp16-00001-of-00001.safetensors"


def test_ctrl_c_stops_at_once_and_leaves_no_partial_file(tmp_path, hub, model):
    write_params(tmp_path, {})
    hub.faults = {"stall": UNET}
    command = [sys.executable, "-m", "pipeline", "prepare-backbone", "--source", "org/model", "--revision", COMMIT]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while not list((tmp_path / "cache").glob(f"*/blobs/{digests(model / UNET)[0]}.*.incomplete")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - started < 2 and process.returncode == 130
    assert "of these" in errors and "completed work is kept" in errors and "Traceback" not in errors
    assert not list((tmp_path / "cache").glob("*/blobs/*.incomplete"))
