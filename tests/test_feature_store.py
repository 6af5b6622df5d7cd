"""The cache: what is written is read back, and nothing damaged or foreign is read."""

import json
import os
import resource
import shutil
import subprocess

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.feature_store import (
    Basis,
    Content,
    Features,
    FeatureSet,
    FeatureSetWriter,
    LayerBasis,
    Plan,
    verification,
)

ROWS, PER_SHARD, P, D = 10, 4, 3, 5


def content(**changes):
    values = dict(
        extraction_version=1, dataset_hash="d", class_names=["a", "b", "c"], backbone={}, timestep=300, image_size=32,
        layers={"up_blocks.1": [0, D]}, prompts=[["a"], ["b"], ["c"]], positive="label", denoise_prompt="",
        negatives="all", noise_seed=0, basis_images=4, basis_sha256=None, image_conditioning=None, dtype="float32",
    )  # fmt: skip
    return Content(**(values | changes))


def open_writer(staging, **changes):
    return FeatureSetWriter(staging, Plan(content(**changes), ROWS, PER_SHARD, {}), "a processor")


def features(rows: range) -> Features:
    rng = np.random.default_rng(rows.start)
    n = len(rows)
    return Features(
        np.array(rows), np.arange(n) % 3, rng.normal(size=(n, D)).astype(np.float16),
        rng.normal(size=(n, P, D)).astype(np.float16), np.tile(np.arange(P, dtype=np.int16), (n, 1)),
    )  # fmt: skip


def write(staging, target=None, shards=(0, 1, 2), redone=0, **changes):
    writer = open_writer(staging, **changes)
    if not writer.has_basis():
        layer = LayerBasis(np.zeros(D), np.eye(D), np.ones(D), float(D))
        writer.write_basis(Basis({"up_blocks.1": layer}, np.zeros(D), np.ones(D)))
    for shard in shards:
        if shard in writer.missing_shards:
            writer.write_shard(shard, features(writer.plan.shard_rows(shard)), redone)
    if target:
        writer.publish(target)
    return writer


def test_rows_come_back_in_the_order_asked_for(tmp_path):
    write(tmp_path / "staging", tmp_path / "set")
    got = FeatureSet(tmp_path / "set").read(np.array([9, 0, 5]))
    assert got.index.tolist() == [9, 0, 5]
    assert np.array_equal(got.denoised[1], features(range(0, 4)).denoised[0])
    assert np.array_equal(got.prompted[2], features(range(4, 8)).prompted[1])
    assert verification.faults(tmp_path / "set", full=True) == []


def test_an_interrupted_set_continues_to_the_same_bytes(tmp_path):
    write(tmp_path / "a", tmp_path / "whole")
    write(tmp_path / "b", shards=[0])
    assert open_writer(tmp_path / "b").missing_shards == [1, 2]
    write(tmp_path / "b", tmp_path / "resumed")
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "resumed" / file.name).read_bytes()


def test_a_flipped_bit_is_named(tmp_path):
    write(tmp_path / "staging", tmp_path / "set")
    shard = tmp_path / "set" / "shard-00001.h5"
    data = bytearray(shard.read_bytes())
    needle = features(range(4, 8)).denoised[2].tobytes()
    data[data.index(needle)] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    with pytest.raises(PipelineError, match=r"shard-00001.h5: row 2 is corrupt"):
        FeatureSet(tmp_path / "set").read(np.arange(ROWS))


def test_a_truncated_shard_is_named(tmp_path):
    write(tmp_path / "staging", tmp_path / "set")
    shard = tmp_path / "set" / "shard-00002.h5"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(PipelineError, match=r"shard-00002.h5 has \d+ bytes"):
        FeatureSet(tmp_path / "set")


def test_a_shard_of_another_set_is_named(tmp_path):
    write(tmp_path / "a", tmp_path / "ours")
    write(tmp_path / "b", tmp_path / "theirs", timestep=100)
    (tmp_path / "ours" / "shard-00000.h5").unlink()
    (tmp_path / "theirs" / "shard-00000.h5").rename(tmp_path / "ours" / "shard-00000.h5")
    with pytest.raises(PipelineError, match="belongs to another feature set"):
        FeatureSet(tmp_path / "ours").read(np.array([0]))


def test_an_incomplete_or_missing_set_is_named(tmp_path):
    write(tmp_path / "staging", tmp_path / "set")
    with pytest.raises(PipelineError, match="holds no feature set"):
        FeatureSet(tmp_path / "nowhere")
    manifest = tmp_path / "set" / "manifest.json"
    text = json.loads(manifest.read_text())
    del text["shards"]["1"]
    manifest.unlink()
    manifest.write_text(json.dumps(text))
    with pytest.raises(PipelineError, match="2 of 3 shards"):
        FeatureSet(tmp_path / "set")


def test_infinite_features_are_refused(tmp_path):
    writer = write(tmp_path / "staging", shards=[])
    broken = features(range(0, 4))
    broken.denoised[0, 0] = np.inf
    with pytest.raises(PipelineError, match="not finite"):
        writer.write_shard(0, broken, 0)


def test_shards_by_many_writers_make_one_set(tmp_path):
    write(tmp_path / "alone", tmp_path / "by_one", redone=2)
    write(tmp_path / "staging", shards=[2], redone=2)
    write(tmp_path / "staging", shards=[0], redone=2)
    write(tmp_path / "staging", tmp_path / "by_many", redone=2)
    for file in (tmp_path / "by_one").iterdir():
        assert file.read_bytes() == (tmp_path / "by_many" / file.name).read_bytes()
    manifest = FeatureSet(tmp_path / "by_many").manifest
    assert manifest.redone_in_float32 == 6 and manifest.provenance["hardware"] == ["a processor"]


def test_a_damaged_shard_is_made_again(tmp_path):
    writer = write(tmp_path / "staging")
    shard = tmp_path / "staging" / "shard-00001.h5"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert writer.missing_shards == []  # of the right size
    writer.forget_damaged(range(3))
    assert writer.missing_shards == [1]
    shard.write_bytes(data[:-1])
    assert writer.missing_shards == [1]


def test_another_basis_makes_its_shards_missing(tmp_path):
    writer = write(tmp_path / "staging")
    layer = LayerBasis(np.ones(D), np.eye(D), np.ones(D), float(D))
    writer.write_basis(Basis({"up_blocks.1": layer}, np.zeros(D), np.ones(D)))
    assert writer.missing_shards == [0, 1, 2]


def test_a_lock_excludes_and_is_let_go(tmp_path):
    one, other = open_writer(tmp_path / "staging"), open_writer(tmp_path / "staging")
    with one.lock("shard-00000") as held:
        assert held
        with other.lock("shard-00000", wait=False) as also_held:
            assert not also_held
    with other.lock("shard-00000", wait=False) as held:
        assert held


def test_the_positive_prompt_is_the_labels_or_the_first(tmp_path):
    for positive, expected in (("label", [0, 1, 2, 0]), ("first", [0, 0, 0, 0])):
        write(tmp_path / positive, tmp_path / f"{positive}-set", positive=positive)
        opened = FeatureSet(tmp_path / f"{positive}-set")
        assert opened.positive_prompts(opened.read(np.arange(4))).tolist() == expected


def test_a_file_size_limit_is_one_line_and_loses_nothing(tmp_path):
    writer = write(tmp_path / "staging", shards=[0])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(PipelineError, match=r"shard-00001.h5.tmp cannot be written \(File too large\)"):
            writer.write_shard(1, features(range(4, 8)), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "staging").glob("*.tmp"))
    assert writer.missing_shards == [1, 2]
    write(tmp_path / "staging", tmp_path / "set")
    assert verification.faults(tmp_path / "set", full=True) == []


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        write(small / "staging", shards=[0])
        (small / "filler").write_bytes(bytes(shutil.disk_usage(small).free - 8192))
        writer = open_writer(small / "staging")
        with pytest.raises(PipelineError, match="No space left on device.*make room and run the same command again"):
            for shard in (1, 2):
                writer.write_shard(shard, features(writer.plan.shard_rows(shard)), 0)
        (small / "filler").unlink()
        write(small / "staging", tmp_path / "set")
        assert verification.faults(tmp_path / "set", full=True) == []
    finally:
        subprocess.run(["umount", small], check=True)
