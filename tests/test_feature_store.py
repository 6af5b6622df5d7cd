"""The cache: what is written is read back, and nothing damaged or foreign is read."""

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.feature_store import Basis, Content, Features, FeatureSet, FeatureSetWriter, LayerBasis, new_manifest

ROWS, PER_SHARD, P, D = 10, 4, 3, 5


def content(**changes):
    values = dict(
        extraction_version=1, dataset_hash="d", class_names=["a", "b", "c"], backbone={}, timestep=300, image_size=32,
        layers={"up_blocks.1": [0, D]}, prompt_template="{class_name}", denoise_prompt="", negatives="all",
        noise_seed=0, basis_images=4, dtype="float32",
    )  # fmt: skip
    return Content(**(values | changes))


def features(rows: range) -> Features:
    rng = np.random.default_rng(rows.start)
    n = len(rows)
    return Features(
        np.array(rows), np.arange(n) % 3, rng.normal(size=(n, D)).astype(np.float16),
        rng.normal(size=(n, P, D)).astype(np.float16), np.tile(np.arange(P, dtype=np.int16), (n, 1)),
    )  # fmt: skip


def write(staging, target=None, shards=(0, 1, 2), **changes):
    writer = FeatureSetWriter(staging, new_manifest(content(**changes), ROWS, PER_SHARD, P, {}))
    if not writer.manifest.basis:
        layer = LayerBasis(np.zeros(D), np.eye(D), np.ones(D), float(D))
        writer.write_basis(Basis({"up_blocks.1": layer}, np.zeros(D), np.ones(D)))
    for shard in shards:
        if shard in writer.missing_shards:
            writer.write_shard(shard, features(writer.manifest.shard_rows(shard)))
    if target:
        writer.publish(target)
    return writer


def test_rows_come_back_in_the_order_asked_for(tmp_path):
    write(tmp_path / "staging", tmp_path / "set")
    got = FeatureSet(tmp_path / "set").read(np.array([9, 0, 5]))
    assert got.index.tolist() == [9, 0, 5]
    assert np.array_equal(got.denoised[1], features(range(0, 4)).denoised[0])
    assert np.array_equal(got.prompted[2], features(range(4, 8)).prompted[1])
    FeatureSet(tmp_path / "set").verify()


def test_an_interrupted_set_continues_to_the_same_bytes(tmp_path):
    write(tmp_path / "a", tmp_path / "whole")
    write(tmp_path / "b", shards=[0])
    assert FeatureSetWriter(tmp_path / "b", new_manifest(content(), ROWS, PER_SHARD, P, {})).missing_shards == [1, 2]
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
    write(tmp_path / "staging", shards=[0, 1])
    with pytest.raises(PipelineError, match="2 of 3 shards"):
        FeatureSet(tmp_path / "staging")
    with pytest.raises(PipelineError, match="holds no feature set"):
        FeatureSet(tmp_path / "nowhere")


def test_infinite_features_are_refused(tmp_path):
    writer = write(tmp_path / "staging", shards=[])
    broken = features(range(0, 4))
    broken.denoised[0, 0] = np.inf
    with pytest.raises(PipelineError, match="not finite"):
        writer.write_shard(0, broken)
