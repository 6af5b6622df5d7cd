"""Complete extractions of a few digits: equal bytes however they run, and equal to a loop of single passes."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import seeding
from pipeline.data.datasets import PreparedDataset
from pipeline.diffusion import backbones, prompts
from pipeline.diffusion.prompted_model import Inputs, PromptedModel
from pipeline.diffusion.prompts import PromptSet
from pipeline.feature_store import FeatureSet, read_basis_file, verification
from pipeline.settings.config import load
from pipeline.settings.params import ExtractFeatures
from pipeline.text import size
from stages.extract_features.cost import count_flops
from tests.conftest import invoke
from tests.extract_features import tiny_models
from tests.extract_features.fixtures import extract, project
from tests.faults import program
from tests.integration import forked


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """20 digits with tiny-sd and all prompts, in 5 shards, extracted by one process."""
    sizes = {"images": 20, "rows_per_shard": 4, "basis_images": 12}
    root = project(tmp_path_factory.mktemp("digits") / "p", **sizes, negatives="all")
    extract(root)
    return root


@pytest.fixture
def unextracted(digits, tmp_path) -> Path:
    """The same project, without features."""
    (tmp_path / "params.yaml").write_bytes((digits / "params.yaml").read_bytes())
    (tmp_path / "models").symlink_to(digits / "models")
    (tmp_path / "data").mkdir()
    for part in ("datasets", "backbones"):
        (tmp_path / "data" / part).symlink_to(digits / "data" / part)
    return tmp_path


TINY = dict(negatives=1, dims=[8, 8, 8], basis_images=6, rows_per_shard=10, image_size=64)
SET = Path("data") / "features" / "digits-tiny-sd-t300"


def test_features_equal_those_of_single_passes(digits):
    config = load(digits / "params.yaml")
    params = config.params.extract_features
    data = PreparedDataset(config.dataset_dir).load("train")
    features = FeatureSet(digits / SET)
    rows, basis = features.read(np.arange(20)), features.basis()
    backbone = backbones.load(config.backbone_dir, "auto", "cpu", torch.float32)
    names = PreparedDataset(config.dataset_dir).class_names
    conditioning = backbone.encode_prompts([f"a photo of a {name}" for name in names] + [""])
    for image in (0, 9, 19):
        latents = backbone.encode_images(data.take(np.array([image])).images, params.image_size)
        noise = torch.randn(latents.shape[1:], generator=seeding.torch_generator(0, "noise", image))[None]
        noisy = backbone.add_noise(latents, noise, 300)
        for prompt in (0, 3, 10):
            maps = backbone.features(noisy, 300, conditioning.select(torch.tensor([prompt])))
            expected = []
            for layer, found in maps.items():
                pca = basis.layers[layer]
                columns = found[0].double().numpy().reshape(len(pca.mean), -1)  # (C, h*w)
                for component in pca.components:
                    scores = [component @ (columns[:, place] - pca.mean) for place in range(columns.shape[1])]
                    expected.append(np.sqrt(np.square(scores).sum()))
            got = rows.denoised[image] if prompt == 10 else rows.prompted[image, prompt]
            np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)  # float16 is good to 5e-4


def test_manifest_records_the_settings_that_made_the_set(digits):
    settings = FeatureSet(digits / SET).manifest.provenance["settings"]
    assert ExtractFeatures.model_validate(settings) == load(digits / "params.yaml").params.extract_features
    assert (settings["rows_per_shard"], settings["basis_images"], settings["basis"]) == (4, 12, "auto")


def test_prepared_images_unlike_the_settings_are_named(digits):
    said = "datasets/digits has 20 training images, but prepare_data has train_subset = 7."
    assert said in invoke(digits, "extract-features", "--set", "prepare_data.train_subset=7").output
    assert "but prepare_data has" not in invoke(digits, "extract-features").output


def test_threads_and_batch_sizes_do_not_change_a_byte(digits, unextracted):
    settings = ("--set", "runtime.unet_batch_size=24", "--set", "runtime.cache_latents=true")
    forked.write_programs(unextracted, "pipeline")
    command = [unextracted / "pipeline", "extract-features", *settings]
    subprocess.run(command, cwd=unextracted, env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True)
    assert contents(unextracted / SET) == contents(digits / SET)


def test_shard_size_does_not_change_features(digits, unextracted):
    found = FeatureSet(extract(unextracted, "--rows-per-shard", "9")).read(np.arange(20))
    expected = FeatureSet(digits / SET).read(np.arange(20))
    for name in vars(expected):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_accelerate_launch_gives_the_same_bytes_as_one_process(digits, unextracted):
    forked.write_programs(unextracted, "accelerate", "python")
    ranked = unextracted / "ranked"
    ranked.write_text('#!/bin/sh\necho "$RANK of $WORLD_SIZE" >> ranks; exec ./python "$@"\n')
    ranked.chmod(0o755)
    options = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    command = [unextracted / "accelerate", "launch", *options, "--dynamo_backend", "no", "-m", "pipeline"]
    interpreter = {"PYTHON_EXEC": str(ranked)}  # which torch.distributed reads
    subprocess.run([*command, "extract-features"], cwd=unextracted, env=os.environ | interpreter, check=True)
    assert sorted((unextracted / "ranks").read_text().splitlines()) == ["0 of 2", "1 of 2"]
    assert contents(unextracted / SET) == contents(digits / SET)


def test_the_set_is_assembled_when_all_shard_ranges_are_done(digits, unextracted):
    staging = extract(unextracted, "--shard-range", "3:5")
    assert sorted(file.name for file in staging.glob("*.h5")) == ["basis.h5", "shard-00003.h5", "shard-00004.h5"]
    assert not (unextracted / SET).exists()
    assert extract(unextracted, "--shard-range", "0:3") == unextracted / SET
    result = invoke(unextracted, "extract-features", "--shard-range", "4:9")  # a complete set has no more shards
    assert result.exit_code == 1 and "4:9" in result.output
    assert contents(unextracted / SET) == contents(digits / SET)
    result = invoke(unextracted, "extract-features", "--timestep", "5", "--shard-range", "4:9")
    assert result.exit_code == 1 and "0 <= A < B <= 5 shards" in result.output


def test_sigterm_stops_between_batches_and_the_next_run_resumes(digits, unextracted):
    command = program.start(unextracted, "extract-features", log=unextracted / "log")
    while command.process.is_alive() and not list(unextracted.glob(".pipeline/staging/*/shard-00001.json")):
        time.sleep(0.005)
    os.kill(command.process.pid, signal.SIGTERM)
    assert command.end() == 143, command.output
    assert "Stopped by SIGTERM: completed work is kept" in command.output and "Traceback" not in command.output
    assert not list(unextracted.glob(".pipeline/staging/*/*.tmp"))
    extract(unextracted)
    assert contents(unextracted / SET) == contents(digits / SET)


def test_a_damaged_shard_in_staging_is_recomputed(digits, unextracted):
    staging = extract(unextracted, "--shard-range", "0:2")
    shard = staging / "shard-00001.h5"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    extract(unextracted, "--shard-range", "2:5")  # the last job sees to the shards of all
    assert contents(unextracted / SET) == contents(digits / SET)


def test_a_finished_set_of_other_settings_is_replaced_only_with_overwrite(digits, unextracted):
    shutil.copytree(digits / SET, unextracted / SET)  # imported, pulled or made here
    for more in ((), ("--shard-range", "0:1")):
        result = invoke(unextracted, "extract-features", "--noise-seed", "5", "--negatives", "2", *more)
        assert result.exit_code == 1 and len(result.output.splitlines()) == 1
        assert (
            f"{SET} holds a finished feature set of other settings or data (negatives, noise_seed). Move or"
            in result.output
        )
        assert result.output.rstrip().endswith("or pass --overwrite.")
    assert not (unextracted / ".pipeline").exists()
    (unextracted / SET / "shard-00003.h5").unlink()  # part of a set is somebody's set too
    assert invoke(unextracted, "extract-features", "--noise-seed", "5").exit_code == 1
    extract(unextracted, "--noise-seed", "5", "--overwrite", "--shard-range", "0:1")
    assert FeatureSet(unextracted / SET, partial=True).manifest == FeatureSet(digits / SET).manifest


def test_cached_latents_are_used_and_damage_is_noticed(digits, unextracted):
    cached = ("--set", "runtime.cache_latents=true", "--shard-range", "0:1")
    extract(unextracted, *cached)
    (file,) = unextracted.glob(".pipeline/latents/*/latents-00000.safetensors")
    before = file.stat().st_mtime_ns
    first = extract(unextracted, *cached, "--timestep", "100") / "shard-00000.h5"
    assert file.stat().st_mtime_ns == before
    expected = first.read_bytes()
    first.with_suffix(".json").unlink()
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    assert (extract(unextracted, *cached, "--timestep", "100") / "shard-00000.h5").read_bytes() == expected
    assert file.stat().st_mtime_ns != before


def test_a_basis_can_be_shared(digits, unextracted, tmp_path):
    own = digits / SET / "basis.h5"
    shared = extract(unextracted, "--basis", str(own), "--timestep", "100")
    manifest = FeatureSet(shared).manifest
    assert manifest.content.basis_images is None and manifest.content.basis_sha256 is not None
    ours, theirs = FeatureSet(shared).basis(), FeatureSet(digits / SET).basis()
    assert np.array_equal(ours.mean, theirs.mean)
    assert all(np.array_equal(ours.layers[name].components, theirs.layers[name].components) for name in ours.layers)
    for arguments, message in [
        (("--dims", "[8, 8, 8]"), "has 64 components of 64 channels, this set needs 8 of 64"),
        (("--layers", "[up_blocks.1]", "--dims", "[64]"), "is a basis of up_blocks.1, up_blocks.2, up_blocks.3, not"),
        (("--basis", "nowhere.h5"), "nowhere.h5 is missing"),
        (("--basis", "params.yaml"), "is not a basis.h5"),
    ]:
        result = invoke(unextracted, "extract-features", "--basis", str(own), *arguments)
        assert result.exit_code == 1 and message in result.output, result.output


def test_self_supervised_features_do_not_read_labels(unextracted):
    words = unextracted / "words.txt"
    words.write_text("cat\ndog\nsun\nmoon\n")
    folder = extract(
        unextracted, "--prompts", "self-supervised", "--negative-words", "words.txt", "--negatives", "2",
        "--denoise-prompt", "a photo of a visual object",
    )  # fmt: skip
    opened = FeatureSet(folder)
    rows = opened.read(np.arange(20))
    assert rows.prompted.shape[1] == 3 and (rows.prompt_class[:, 0] == 0).all()
    assert opened.positive_prompts(rows).tolist() == [0] * 20
    assert opened.manifest.content.prompts[0] == ["a photo of a similar object"]


def test_nearest_negatives_reach_the_set(unextracted, monkeypatch):
    compared, nearest = [], prompts.nearest
    monkeypatch.setattr(prompts, "nearest", lambda *arguments: compared.append(arguments) or nearest(*arguments))
    opened = FeatureSet(extract(unextracted, "--negatives", "2", "--shard-range", "0:5"))
    assert len(compared) == 1 < len(opened.manifest.shards)
    rows = opened.read(np.arange(20))
    assert rows.prompt_class.shape == (20, 3)
    positive = opened.positive_prompts(rows)
    assert (rows.prompt_class[np.arange(20), positive] == rows.label).all()


def test_the_content_of_a_prompt_file_is_part_of_the_fingerprint(unextracted):
    folders = set()
    for text in ("a curly three", "[a three, a 3]"):
        (unextracted / "own.yaml").write_text(f"handwritten number 3: {text}\n")
        folders.add(extract(unextracted, "--class-prompts", "own.yaml", "--shard-range", "0:1"))
    assert len(folders) == 2


def test_half_precision_overflow_is_recomputed_in_float32_and_counted(tmp_path):
    source = tiny_models.sd(tmp_path / "loud")
    unet = source / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(unet)
    weights["up_blocks.2.resnets.0.conv1.weight"] *= 1e7  # beyond float16 inside the block, normalised before its end
    weights["up_blocks.2.resnets.0.conv1.bias"] *= 1e7
    save_file(weights, unet, metadata={"format": "pt"})
    root = project(tmp_path / "p", images=10, source=source, **TINY)
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("unet_batch_size: auto", "unet_batch_size: 16"))  # pads less
    reference = FeatureSet(extract(root)).read(np.arange(10))
    fitted = read_basis_file(next(root.glob("data/features/*/basis.h5")), ["up_blocks.1", "up_blocks.2", "up_blocks.3"])
    shared = root / "shared.h5"
    shutil.copy(next(root.glob("data/features/*/basis.h5")), shared)
    result = invoke(root, "extract-features", "--dtype", "float16", "--overwrite")
    assert "12 of 12 passes of the basis overflowed float16" in result.output  # 6 images, twice
    opened = FeatureSet(next(root.glob("data/features/*")))
    assert (opened.manifest.basis.redone_in_float32, opened.manifest.redone_in_float32) == (6 * 2, 10 * 3)
    again = opened.basis()
    for layer, of_layer in fitted.layers.items():
        np.testing.assert_allclose(again.layers[layer].mean, of_layer.mean, rtol=1e-3, atol=1e-3)
        assert again.layers[layer].total_variance == pytest.approx(of_layer.total_variance, rel=1e-3)
    opened = FeatureSet(extract(root, "--basis", str(shared), "--dtype", "float16", "--overwrite"))
    assert opened.manifest.redone_in_float32 == 10 * 3
    found = opened.read(np.arange(10))
    np.testing.assert_allclose(found.prompted, reference.prompted, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found.denoised, reference.denoised, rtol=2e-3, atol=2e-3)
    sweep = ("--timesteps", "[300]", "--images", "10", "--margin-images", "0", "--basis-images", "5")
    result = invoke(root, "sweep-features", *sweep, "--set", "extract_features.dtype=float16")
    assert "10 of 10 passes of timestep 300 overflowed float16 and were recomputed in float32." in result.output


@pytest.mark.parametrize("basis", ["fitted", "shared"])
def test_features_beyond_the_range_of_float16_name_their_layer(tmp_path, basis):
    source = tiny_models.sd(tmp_path / "large")
    root = project(tmp_path / "p", images=10, source=source, **TINY)
    settings = ["--overwrite"]
    if basis == "shared":
        shutil.copy(extract(root) / "basis.h5", root / "shared.h5")
        settings += ["--basis", "shared.h5"]
        shutil.rmtree(root / ".pipeline")
    unet = source / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(unet)
    for part in ("weight", "bias"):  # the last layer's output grows: nothing after it does
        for block in range(2):
            weights[f"up_blocks.3.attentions.{block}.proj_out.{part}"] *= 1e6
    save_file(weights, unet, metadata={"format": "pt"})
    assert invoke(root, "prepare-backbone").exit_code == 0
    result = invoke(root, "extract-features", *settings)
    assert result.exit_code == 1
    assert "up_blocks.3 gives features beyond 65504" in result.output.splitlines()[-1]
    written = {file.name for file in root.glob(".pipeline/staging/*/*.h5")}
    assert written == (set() if basis == "fitted" else {"basis.h5"})  # found while the basis is fitted, not hours later
    extract(root, *settings[:1], "--layers", "[up_blocks.1, up_blocks.2]", "--dims", "[8, 8]")  # what it advises


def test_recomputed_pairs_do_not_depend_on_the_rest_of_their_batch(tmp_path, monkeypatch):
    backbone = backbones.load(tiny_models.sd(tmp_path / "sd"), "auto", "cpu", torch.float16)
    model = PromptedModel(backbone, PromptSet([["a cat"], ["a dog"]], "label"), "")
    noisy = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(type(backbone), "features", overflowing(type(backbone).features))
    inputs, number = Inputs(noisy, None), torch.arange(20)
    together = model.finite_maps(inputs, 300, number, number % 2)
    assert model.recomputed == 20
    rows = torch.tensor([7, 19, 3, 3, 3])  # the last ones fill up the batch
    few = model.finite_maps(inputs, 300, rows, rows % 2)
    assert model.recomputed == 20 + 3
    assert all(torch.equal(few[layer], together[layer][rows]) for layer in backbone.channels)


def overflowing(features):
    """The denoiser, whose 16-bit maps are all infinite in one place of the last layer."""

    def changed(self, noisy, timestep, conditioning):
        maps = features(self, noisy, timestep, conditioning)
        if self.dtype != torch.float32:
            maps[next(reversed(maps))][:, 0, 0, 0] = float("inf")
        return maps

    return torch.inference_mode()(changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--image-size", "40"], "image_size = 40 does not fit pixart. Set a multiple of 16"),
        (["--image-size", "8"], "image_size = 8 does not fit pixart. Set a multiple of 16"),
        (["--timestep", "999", "--dims", "[8]"], "dims = [8] does not fit layers"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_rejected_before_it_is_loaded(transformer, settings, message):
    for command in (["extract-features"], ["extract-features", "--dry-run"]):
        result = invoke(transformer, *command, *settings)
        assert result.exit_code == 1 and len(result.output.splitlines()) == 1 and message in result.output
    if "--dims" not in settings:  # a sweep chooses its own
        names = [f"extract_features.{flag[2:].replace('-', '_')}" for flag in settings[::2]]
        changes = [f"--set={name}={value}" for name, value in zip(names, settings[1::2], strict=True)]
        result = invoke(transformer, "sweep-features", "--dry-run", *changes)
        assert result.exit_code == 1 and len(result.output.splitlines()) == 1 and message in result.output


@pytest.fixture(scope="module")
def transformer(tmp_path_factory) -> Path:
    """A project with a PixArt whose weights cannot be loaded."""
    root = tmp_path_factory.mktemp("transformer")
    source = tiny_models.pixart(root / "pixart")
    save_file({"unknown": torch.zeros(1)}, source / "transformer" / "diffusion_pytorch_model.safetensors")
    return project(root / "p", images=20, source=source, **TINY)


def test_maps_that_are_not_finite_in_float32_either_name_the_layer_and_leave_no_basis(tmp_path):
    source = tiny_models.sd(tmp_path / "broken")
    unet = source / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(unet)
    weights["up_blocks.2.resnets.0.conv1.weight"][0] = float("nan")
    save_file(weights, unet, metadata={"format": "pt"})
    root = project(
        tmp_path / "p", images=10, source=source, **TINY,
    )  # fmt: skip
    for dtype in ("float32", "float16"):
        result = invoke(root, "extract-features", "--dtype", dtype)
        assert result.exit_code == 1
        assert "up_blocks.2 of the frozen model is not finite at timestep 300, even in float32" in result.output
        assert not list(root.glob(".pipeline/staging/*/basis.h5"))


def test_timesteps_past_the_models_schedule_are_rejected_before_it_is_loaded(tmp_path):
    source = tiny_models.sd(tmp_path / "short")
    file = source / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_train_timesteps": 200}))
    root = project(
        tmp_path / "p", images=10, source=source, **TINY,
    )  # fmt: skip
    for flags in ((), ("--dry-run",)):
        result = invoke(root, "extract-features", "--timestep", "200", *flags)
        assert result.exit_code == 1 and "extract_features.timestep = 200" in result.output
        assert "the noise schedule of short has 200 timesteps. Set it to at most 199." in result.output
        result = invoke(root, "sweep-features", "--timesteps", "[50, 300]", *flags)
        assert result.exit_code == 1 and "sweep_features.timesteps = 300" in result.output
    extract(root, "--timestep", "199")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_types_are_close(digits, unextracted, dtype):
    small = ("--negatives", "1", "--set", "runtime.unet_batch_size=16")  # of passes that take long on a CPU
    shared = ("--basis", str(digits / SET / "basis.h5"), "--dtype", dtype, *small)
    found = FeatureSet(extract(unextracted, *shared)).read(np.arange(20)).denoised.astype(float)
    expected = FeatureSet(digits / SET).read(np.arange(20)).denoised.astype(float)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < {"bfloat16": 0.02, "float16": 0.003}[dtype]


@pytest.mark.parametrize("family", ["sdxl", "pixart", "sd3"])
def test_every_family_runs_through_the_command_line(tmp_path, family):
    source = tiny_models.FAMILIES[family](tmp_path / family)
    root = project(
        tmp_path / "p", images=10, source=source, **TINY, prompt_templates=["a {class_name}", "the {class_name}"],
    )  # fmt: skip
    opened = FeatureSet(extract(root))
    assert verification.problems(opened.path, full=True) == []
    assert opened.manifest.content.num_dims == 24
    assert all(name.split("/")[0] in json.loads((source / "model_index.json").read_text())
               for name in opened.manifest.content.backbone)  # fmt: skip


def test_image_conditioning_changes_only_prompted_features(tmp_path):
    source = tiny_models.sd(tmp_path / "sd")
    root = project(
        tmp_path / "p", images=10, source=source, **TINY,
    )  # fmt: skip
    without = FeatureSet(extract(root)).read(np.arange(10))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tiny_models.clip_vision().save_pretrained(root / "clip")
        tiny_models.clip_vision(projection=20).save_pretrained(root / "clip20")
    conditioned = FeatureSet(extract(root, "--image-conditioning", "clip", "--overwrite")).read(np.arange(10))
    assert np.array_equal(conditioned.denoised, without.denoised)
    assert not np.allclose(conditioned.prompted, without.prompted, atol=1e-2)
    (root / "clip" / "model.fp16.safetensors").write_bytes(b"not loaded")  # beside the full weights: the same encoder
    result = invoke(root, "extract-features", "--image-conditioning", "clip")
    assert result.exit_code == 0 and "is complete already" in result.output
    result = invoke(root, "extract-features", "--image-conditioning", "clip20", "--overwrite")
    assert result.exit_code == 1 and "embeds images in 20 numbers, but sd has prompt embeddings of 16" in result.output
    result = invoke(root, "extract-features", "--image-conditioning", "nowhere")
    assert result.exit_code == 1 and "has no .safetensors weights" in result.output


@pytest.mark.usefixtures("quick_dry_runs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dry_run_prints_the_cost_and_writes_nothing(unextracted, dtype):
    flags = ("--dry-run", "--processes", "8", "--negatives", "2", "--dtype", dtype)
    flags += ("--set", "runtime.unet_batch_size=16")  # float16 takes long on a CPU
    result = invoke(unextracted, "extract-features", *flags)
    assert result.exit_code == 0
    assert "20 in 5 shards" in result.output and "4 per image, 80 in all, and 24 for the basis" in result.output
    assert "8 processes, each with a GPU or a machine of its own" in result.output
    assert sorted(path.name for path in unextracted.iterdir()) == ["data", "models", "params.yaml"]
    assert re.search(r"^memory .*B per process", result.output, re.MULTILINE)
    assert re.search(r"^descriptors +about \d+ of ", result.output, re.MULTILINE)
    # a row: 144 dims x 2 bytes x (1 denoised + 3 prompted), 3 prompt numbers of 2 bytes, index, label, checksum
    # the basis: per layer the mean of its channels, and that many components with their variances, of 8 bytes; the rest
    # are HDF5's own structures in five shards and the basis
    basis = 8 * sum(channels + channels * (channels + 1) for channels in (64, 48, 32))
    assert f"disk          {size(20 * (144 * 2 * 4 + 3 * 2 + 8 + 8 + 4) + basis + 5 * 8192 + 16384)} (" in result.output


@pytest.mark.usefixtures("quick_dry_runs")
@pytest.mark.usefixtures("quick_dry_runs")
def test_a_dry_run_says_what_is_in_place(digits, unextracted):
    def said(*arguments):
        quick = ("--dry-run", "--set", "runtime.unet_batch_size=16")
        lines = invoke(unextracted, "extract-features", *quick, *arguments).output.splitlines()
        passes.append(next(line.split(maxsplit=1)[1] for line in lines if line.startswith("passes")))
        return next((line for line in lines if line.startswith("in place")), "")

    passes = []

    staging = extract(unextracted, "--shard-range", "3:5")
    shutil.rmtree(staging / "locks")
    before = {file: file.stat().st_mtime_ns for file in staging.rglob("*")}
    assert said() == "in place      2 of 5 shards are finished: a run computes the others"
    assert passes == ["11 per image, 132 for the 3 missing shards"]  # of 4 images each; the basis is there
    assert {file: file.stat().st_mtime_ns for file in staging.rglob("*")} == before
    assert said("--timestep", "5") == said("--rows-per-shard", "8") == ""
    assert passes[1] == passes[2] == "11 per image, 220 in all, and 24 for the basis"
    extract(unextracted, "--shard-range", "0:3")
    assert said().endswith("digits-tiny-sd-t300 holds this set: a run only checks it (the time is that of a new set)")
    other = said("--noise-seed", "5")
    assert other.startswith("in place      a run would end at once (the time is with --overwrite): ")
    assert "holds a finished feature set of other settings or data (noise_seed). Move or delete the folder" in other
    assert said("--noise-seed", "5", "--overwrite").endswith("t300 holds another set, which a run replaces")
    (unextracted / SET / "manifest.json").unlink()
    assert "all 5 shards are finished: a run puts the set together" in said()
    result = invoke(unextracted, "extract-features", "--dry-run", "--shard-range", "0:1")
    assert result.exit_code == 2 and "Leave out --shard-range" in result.output


def test_flops_are_counted_up_to_the_last_layer(tmp_path):
    path = tiny_models.sd(tmp_path / "sd")
    backbone = backbones.load(path, "auto", "cpu", torch.float32)
    conditioning = backbone.encode_prompts(["a"])
    counted = [count_flops(path, [f"up_blocks.{block}"], 64, conditioning) for block in range(4)]
    assert counted[0][0] == counted[3][0]
    assert counted[0][1] < counted[1][1] < counted[2][1] < counted[3][1]
    expected = 0  # convolutions and linear layers of the VAE's encoder, and its one attention, by their definition
    vae = backbone._vae

    def hook(module, inputs, output):
        nonlocal expected
        if isinstance(module, torch.nn.Conv2d):
            expected += 2 * output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        elif isinstance(module, torch.nn.Linear):
            expected += 2 * output.numel() * module.in_features
        else:
            tokens, channels = inputs[0].shape[-1] * inputs[0].shape[-2], inputs[0].shape[1]
            expected += 2 * 2 * tokens * tokens * channels  # scores, and their sum over values

    kinds = (torch.nn.Conv2d, torch.nn.Linear, type(vae.encoder.mid_block.attentions[0]))
    for module in vae.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(hook)
    backbone.encode_images(np.zeros((1, 64, 64, 3), np.uint8), 64)
    assert counted[0][0] == expected


def test_log_counts_images_and_passes(unextracted):
    # 20 images in 5 shards of 4, each with 10 prompts and the generic one; the basis is not counted
    first = invoke(unextracted, "extract-features", "--shard-range", "0:2")
    assert "8 images, 88 passes in" in first.output
    assert "12 images, 132 passes in" in invoke(unextracted, "extract-features").output
    assert "passes" not in invoke(unextracted, "extract-features").output  # complete already
